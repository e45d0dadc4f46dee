"""Training in a thread other than the main one."""

from __future__ import annotations

import dataclasses
import signal
import threading
import warnings

import pytest
import torch

from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer


def make_trainer(folder, seed=0):
    folder.mkdir()
    config = preset_config("tiny", "lr")
    return Trainer(dataclasses.replace(config, steps=6, seed=seed, save_every=3), folder)


def fit_in_thread(trainer):
    """Train in a thread of its own; return what it warned of, or raise what it raised."""
    outcome = []

    def work():
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.fit()
            outcome.append([str(warning.message) for warning in caught])
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(100)
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result


def parameters(trainer):
    return [p.detach() for p in trainer.model.parameters()]


def test_it_ends_with_the_same_bits_and_says_that_signals_are_not_handled(tmp_path):
    expected = make_trainer(tmp_path / "main")
    expected.fit()
    trainer = make_trainer(tmp_path / "thread")
    said = fit_in_thread(trainer)
    assert sum("outside of the main thread" in message for message in said) == 1
    for mine, theirs in zip(parameters(trainer), parameters(expected), strict=True):
        assert torch.equal(mine, theirs)
    assert list((tmp_path / "thread").glob("**/*.safetensors"))


@pytest.mark.parametrize("in_thread", [False, True])
def test_handlers_of_signals_are_as_before(tmp_path, in_thread):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    trainer = make_trainer(tmp_path / "run")
    if in_thread:
        fit_in_thread(trainer)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            trainer.fit()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_two_runs_in_two_threads_do_not_disturb_each_other(tmp_path):
    alone = [make_trainer(tmp_path / f"alone{seed}", seed) for seed in (1, 2)]
    for trainer in alone:
        trainer.fit()
    together = [make_trainer(tmp_path / f"together{seed}", seed) for seed in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=trainer.fit, daemon=True) for trainer in together]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(parameters(one), parameters(other), strict=True):
            assert torch.equal(mine, theirs)
