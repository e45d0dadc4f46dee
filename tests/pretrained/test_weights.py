"""Look-ups of runs that train meanwhile: a checkpoint may be pruned before it is read."""

import hashlib
import shutil

import pytest
import torch

from looped_fast import LoopedTransformer
from looped_fast.errors import CheckpointError
from looped_fast.pretrained import find_checkpoint, load_run, load_start, provenance
from looped_fast.pretrained.provenance import weights_sha256
from looped_fast.pretrained.weights import read_newest
from looped_fast.training import checkpoint
from looped_fast.training.config import TrainConfig

CONFIG = TrainConfig(n_dims=3, n_points=5, n_positions=7, n_embd=16, n_head=2, n_loops=4, window=2)


def save(run, step):
    """What a training run that keeps one checkpoint does."""
    model = LoopedTransformer(CONFIG.model_config())
    optimizer = torch.optim.Adam(model.parameters())
    return checkpoint.save(run, step, model, optimizer, config=CONFIG.to_dict(), keep=1)


@pytest.fixture
def trained_meanwhile(tmp_path, monkeypatch):
    """A run that saves again, and prunes, whenever one of its files is about to be read."""
    save(tmp_path, 1)
    steps = iter(range(2, 5))

    def saving_first(read):
        def wrapped(path, *args):
            if (step := next(steps, None)) is not None:
                save(tmp_path, step)
            return read(path, *args)

        return wrapped

    monkeypatch.setattr(checkpoint, "load", saving_first(checkpoint.load))
    monkeypatch.setattr(provenance, "read_file", saving_first(provenance.read_file))
    return tmp_path


def test_a_run_is_loaded_whole_from_its_newest_checkpoint(trained_meanwhile):
    run = load_run(trained_meanwhile, "cpu")
    assert run.step == 4
    assert run.path == checkpoint.latest(trained_meanwhile)
    weights = (run.path / checkpoint.MODEL).read_bytes()
    assert run.sha256 == hashlib.sha256(weights).hexdigest()
    assert run.name == trained_meanwhile.name


def test_a_run_starts_from_the_newest_weights_of_another(trained_meanwhile):
    start = load_start(trained_meanwhile)
    assert start.path == checkpoint.latest(trained_meanwhile)
    saved = checkpoint.load(start.path).model_state
    assert all(torch.equal(start.model_state[name], saved[name]) for name in saved)


def test_the_newest_weights_are_hashed(trained_meanwhile):
    digest = weights_sha256(trained_meanwhile)
    weights = checkpoint.latest(trained_meanwhile) / checkpoint.MODEL
    assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_damaged_newest_checkpoint_is_an_error_not_a_loop(tmp_path):
    path = save(tmp_path, 1)
    (path / checkpoint.MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 0 bytes"):
        load_run(tmp_path, "cpu")


def test_a_run_that_is_removed_while_it_is_read_is_named(tmp_path):
    run = tmp_path / "run"
    save(run, 1)

    def removed(path):
        shutil.rmtree(run)
        return checkpoint.load(path)

    with pytest.raises(FileNotFoundError, match=f"{run} does not exist"):
        read_newest(run, removed)
    with pytest.raises(FileNotFoundError, match=f"{run} does not exist"):
        find_checkpoint(run)
