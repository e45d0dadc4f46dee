"""Shipped weights do what their cards say, and a card says how to make them again."""

import dataclasses
import shlex

import pytest
import torch

import looped_fast
from looped_fast import pretrained
from looped_fast.evaluation import model_errors
from looped_fast.pretrained import __main__ as release
from looped_fast.train import main as train
from looped_fast.train import parse
from looped_fast.training import checkpoint
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

NAMES = pretrained.names()
EVERY = pytest.mark.parametrize("name", NAMES)


def errors_at_b(name, n_prompts):
    config = pretrained.train_config(name)
    model = looped_fast.from_pretrained(name)
    b = config.n_loops
    return model_errors(
        model, config.make_task(), [b], n_prompts, config.n_points, seed=config.seed
    )[b]


@EVERY
def test_the_weights_err_as_their_card_says(name):
    meta = checkpoint.load(pretrained.path(name)).meta
    recorded = meta["errors"][str(pretrained.train_config(name).n_loops)]
    # Rounding differs between machines and the loop amplifies it; a mean over prompts hardly moves.
    torch.testing.assert_close(
        errors_at_b(name, meta["prompts"]), torch.tensor(recorded).double(), rtol=0.01, atol=1e-5
    )


@EVERY
def test_a_card_is_that_of_the_weights_beside_it(name):
    folder = pretrained.path(name)
    assert (folder / "README.md").read_text() == release.card(folder)


@EVERY
def test_the_command_of_a_card_has_the_settings_of_the_run(name):
    card = (pretrained.path(name) / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("python -m")]
    assert parse(shlex.split(line)[3:])[0].settings == pretrained.train_config(name)


def test_the_looped_regression_model_holds_its_solution_far_beyond_its_training():
    errors = checkpoint.load(pretrained.path("lr-small")).meta["errors"]
    at_b, *beyond = (errors[str(n_loops)][-1] for n_loops in (12, 24, 120))
    assert max(beyond) <= 2 * at_b
    standard = checkpoint.load(pretrained.path("lr-standard-small")).meta["errors"]["1"][-1]
    assert at_b <= 2 * standard


def test_all_weights_together_have_at_most_8_mb():
    files = [pretrained.path(name) / checkpoint.MODEL for name in NAMES]
    assert 0 < sum(file.stat().st_size for file in files) <= 8e6


def test_an_unknown_name_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown pretrained model 'lr-smal'; did you mean 'lr-"):
        looped_fast.from_pretrained("lr-smal")


def test_a_run_starts_from_shipped_weights(tmp_path):
    name = "lr-small"
    config = dataclasses.replace(
        pretrained.train_config(name), init_from=str(pretrained.path(name))
    )
    with pytest.raises(
        ValueError, match=r"init_from = .* is not read by a Trainer; pass start=.*load_start"
    ):
        Trainer(config, tmp_path)
    start = pretrained.load_start(config.init_from)
    started = Trainer(config, tmp_path, start=start).model.state_dict()
    for key, value in looped_fast.from_pretrained(name).state_dict().items():
        assert torch.equal(started[key], value), key


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """A finished run of a preset that takes a second, in place of small."""
    config = dataclasses.replace(
        preset_config("tiny"), steps=4, batch_size=2, n_points=4, eval_every=2, eval_prompts=8,
        log_every=2, save_every=2, preset="small",
    )  # fmt: skip
    monkeypatch.setattr("looped_fast.train.preset_config", lambda *_, **__: config)
    monkeypatch.setattr(release, "_PROMPTS", 16)
    assert train(["--preset", "small", "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_a_release_is_the_weights_of_the_run_with_its_record(finished_run, tmp_path):
    folder = release.release(finished_run, 0.5, "One thread.", tmp_path)
    assert folder == tmp_path / "lr-small"
    named = release.release(finished_run, 0.5, "One thread.", tmp_path, name="mine")
    assert named == tmp_path / "mine"
    assert (named / "README.md").read_text().startswith("# mine\n")
    shared, own = checkpoint.load(folder), checkpoint.load(checkpoint.latest(finished_run))
    for key, value in own.model_state.items():
        assert torch.equal(shared.model_state[key], value), key
    assert set(shared.meta["errors"]) == {"6", "12", "24", "120"}  # T, b, 2b, 10b
    assert [step for step, _, _ in shared.meta["curve"]] == [2, 4]
    card = (folder / "README.md").read_text()
    assert "Seed 42, 4 steps" in card
    assert "0.5 minutes of processor time.\nOne thread." in card


def test_an_unfinished_run_is_not_released(finished_run, tmp_path, capsys):
    (latest := checkpoint.latest(finished_run)).rename(tmp_path / "hidden")
    assert release.main([str(finished_run), "--cpu-minutes", "1", "--how", "x"]) == 2
    assert "stopped at step 2 of 4; finish it with" in capsys.readouterr().err
    assert latest.name == "step-00000004"


def test_a_command_names_settings_that_differ_from_the_preset():
    config = preset_config("small", "sparse_lr")
    loops = dataclasses.replace(config.curriculum.loops, start=None)
    changed = dataclasses.replace(
        config,
        steps=7,
        init_from="a folder",
        curriculum=dataclasses.replace(config.curriculum, loops=loops),
    )
    words = release.command(changed)
    assert shlex.join(words[:3]) == "python -m looped_fast.train"
    assert parse(words[3:])[0].settings == changed
    assert len(words) == len(release.command(config)) + 6


def test_a_folder_without_a_run_is_not_released(tmp_path, capsys):
    assert release.main([str(tmp_path), "--cpu-minutes", "1", "--how", "x"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
