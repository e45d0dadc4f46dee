"""``python -m looped_fast.sweep`` and the sweeps it runs."""

import csv
import json
from hashlib import sha256

import numpy as np
import pytest

from looped_fast.paper import ablations, sweep
from looped_fast.paper.ablations import SWEEPS
from looped_fast.paper.experiments import last_checkpoint, shortened
from looped_fast.training import checkpoint
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

LINE = ("--preset", "tiny", "--steps", "2", "--prompts", "32")


@pytest.fixture
def two_runs(monkeypatch):
    """Register a sweep of two minimal runs."""
    small = {"n_embd": 32, "n_head": 2, "n_points": 6, "n_positions": 6, "n_loops": 3, "window": 2}
    runs = {
        "looped": small,
        "standard": {**small, "model": "standard", "n_loops": 1, "window": 1, "n_layer": 2},
    }
    monkeypatch.setitem(SWEEPS, "two", lambda base: runs)


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_is_valid_at_every_scale_and_holds_its_preset(name, preset):
    runs = sweep.sweep_runs(name, "lr", preset, seed=7)
    base = preset_config(preset, "lr").to_dict()
    assert len(runs) >= 3
    assert all(config.seed == 7 for config in runs.values())
    assert any({**config.to_dict(), "seed": base["seed"]} == base for config in runs.values())


def test_the_window_sweep_grows_the_loop_count_from_each_window():
    for config in sweep.sweep_runs("loops_and_window", "lr", "small").values():
        loops = config.make_curriculum().loops
        assert (loops.start, loops.end) == (config.window, config.n_loops)


def test_the_prompts_sweep_compares_looped_with_standard():
    runs = sweep.sweep_runs("prompts", "lr", "small")
    pairs = {(config.model, config.train_prompts) for config in runs.values()}
    assert {("looped", 1000), ("standard", 1000), ("looped", None), ("standard", None)} <= pairs


def test_fewer_steps_pass_through_the_whole_curriculum():
    full = preset_config("small", "lr")
    short = shortened(full, full.steps // 10)
    for fraction in (0.0, 0.3, 0.99):
        expected = full.make_curriculum().at(int(fraction * full.steps))
        assert short.make_curriculum().at(int(fraction * short.steps)) == expected
    assert short.warmup_steps == full.warmup_steps // 10


def test_a_sweep_trains_evaluates_and_draws(two_runs, tmp_path, capsys):
    assert sweep.main(["two", *LINE, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert (results["scale"], results["prompts"], results["seed"]) == ("lr, tiny, 2 steps", 32, 42)
    looped, standard = results["runs"]["looped"], results["runs"]["standard"]
    assert len(looped["by_loops"]) == sweep.FAR * 3
    assert len(standard["by_loops"]) == 1
    weights = checkpoint.latest(tmp_path / "1-looped") / checkpoint.MODEL
    assert looped["sha256"] == sha256(weights.read_bytes()).hexdigest()
    assert results["versions"]["numpy"] == np.__version__
    assert looped["by_loops"][2] == pytest.approx(looped["by_position"]["mean"][-1])
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 + 12 + 1
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "standard" in capsys.readouterr().out


def test_the_same_command_resumes_a_stopped_sweep(two_runs, tmp_path, monkeypatch):
    steps_made = []
    whole_step = Trainer.training_step

    def counted_step(trainer):
        whole_step(trainer)
        steps_made.append(trainer.config.model)
        if len(steps_made) == 3:
            trainer._on_signal(2, None)

    monkeypatch.setattr(Trainer, "training_step", counted_step)
    assert sweep.main(["two", *LINE, "--out", str(tmp_path)]) == 128 + 2
    assert not (tmp_path / "sweep.json").exists()
    assert sweep.main(["two", *LINE, "--out", str(tmp_path)]) == 0
    assert steps_made == ["looped", "looped", "standard", "standard"]


def test_a_run_of_an_earlier_version_resumes(tmp_path):
    config = preset_config("tiny")
    trainer = Trainer(config, tmp_path)
    older = {name: value for name, value in config.to_dict().items() if name != "cuda_graphs"}
    checkpoint.save(tmp_path, 5, trainer.model, trainer.optimizer, config=older)
    assert last_checkpoint(config, tmp_path).step == 5


def test_a_folder_with_another_sweep_is_refused(two_runs, tmp_path, capsys):
    assert sweep.main(["two", *LINE, "--out", str(tmp_path)]) == 0
    before = checkpoint.latest(tmp_path / "1-looped")
    assert sweep.main(["two", *LINE, "--seed", "1", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "seed 42 -> 1" in message
    assert "--out" in message
    assert checkpoint.latest(tmp_path / "1-looped") == before


def test_too_few_prompts_are_refused_before_training(two_runs, tmp_path, capsys):
    assert sweep.main(["two", *LINE, "--prompts", "19", "--out", str(tmp_path)]) == 2
    assert "prompts = 19: at least 20" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_sweep_is_named_with_the_nearest_valid_one(tmp_path, capsys):
    assert sweep.main(["inject", *LINE, "--out", str(tmp_path)]) == 2
    assert "did you mean 'injection'" in capsys.readouterr().err


def test_the_help_names_every_sweep():
    assert all(name in sweep.Command.__doc__ for name in ablations.SWEEPS)
