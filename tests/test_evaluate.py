from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from looped_fast import LoopedTransformer
from looped_fast.evaluate import main
from looped_fast.evaluation import figures, model_errors
from looped_fast.evaluation.shifts import SHIFTS
from looped_fast.pretrained.runs import load_run
from looped_fast.training import checkpoint, checkpoint_read
from looped_fast.training.config import TrainConfig

SIZE = {"n_dims": 3, "n_points": 5, "n_positions": 7, "n_embd": 16, "n_head": 2}
LOOPED = {"n_loops": 4, "window": 2}
STANDARD = {"model": "standard", "injection": "none", "n_loops": 1, "window": 1, "n_layer": 2}
QUICK = ["--prompts", "20", "--loop-prompts", "20", "--max-loops", "9", "--baselines", "quick"]
FAR = "looped, 500 loops"  # as in the official figures


def make_run(path, fill=None, **changes):
    """Make the folder of a run that was saved before any training, or with weights of ``fill``."""
    config = TrainConfig(**{**SIZE, **LOOPED, **changes})
    torch.manual_seed(0)
    model = LoopedTransformer(config.model_config())
    optimizer = torch.optim.Adam(model.parameters())
    if fill is not None:
        torch.nn.init.constant_(model._read_in.weight, fill)
    checkpoint.save(path, 8, model, optimizer, config=config.to_dict())
    return str(path)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "looped")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def no_figures(monkeypatch):
    """Draw nothing in tests of numbers: drawing takes longer than computing them."""
    for kind in ("position", "loop", "shift"):
        monkeypatch.setattr(figures, f"{kind}_figure", lambda *_: None)
    monkeypatch.setattr(figures, "save", lambda *_: [])


def evaluate(*arguments, out):
    return main([*map(str, arguments), "--out", str(out)])


def results(out, name="evaluation"):
    return json.loads((out / f"{name}.json").read_text())


def test_it_writes_numbers_and_figures_in_every_format(run, out, capsys):
    assert evaluate(run, *QUICK, out=out) == 0
    stems = {"positions": ["csv", "pdf", "png"], "loops": ["csv", "pdf", "png"]}
    expected = {f"{stem}.{kind}" for stem, kinds in stems.items() for kind in kinds}
    assert {file.name for file in out.iterdir()} == expected | {"evaluation.json"}
    assert all(file.stat().st_size > 300 for file in out.iterdir())
    assert "squared error / variance" in capsys.readouterr().out


def test_the_numbers_are_those_of_the_model_with_a_band_around_them(run, out, no_figures):
    evaluate(run, *QUICK, "--seed", 3, out=out)
    found = results(out)
    loaded = load_run(run, "cpu")
    errors = model_errors(loaded.model, loaded.task, range(1, 10), 20, 5, seed=3)
    curve = found["positions"]["looped"]
    assert curve["mean"] == pytest.approx(errors[4].tolist(), rel=1e-4)  # at the trained b
    loops = found["loops"]["curves"]["looped"]
    assert loops["mean"] == pytest.approx([e[-1].item() for e in errors.values()], rel=1e-4)
    for one in (*found["positions"].values(), loops):
        for low, mean, high in zip(one["low"], one["mean"], one["high"], strict=True):
            assert low <= mean <= high
    assert set(found["positions"]) == {"looped", FAR, "least squares", "3-nearest neighbours"}
    after_500 = model_errors(loaded.model, loaded.task, [500], 20, 5, seed=3)[500]
    assert found["positions"][FAR]["mean"] == pytest.approx(after_500.tolist(), rel=1e-4)


def test_the_csv_holds_the_same_numbers(run, out, no_figures):
    evaluate(run, *QUICK, out=out)
    for stem, first in (("positions", "0"), ("loops", "1")):
        found = results(out)[stem]
        curves = found["curves"] if stem == "loops" else found
        with (out / f"{stem}.csv").open() as stream:
            rows = list(csv.reader(stream))[1:]
        assert len(rows) == sum(len(curve["mean"]) for curve in curves.values())
        assert rows[0][:2] == ["looped", first]
        curve = curves["looped"]
        assert [float(v) for v in rows[1][2:]] == [curve[k][1] for k in ("mean", "low", "high")]


def test_results_state_what_they_depend_on(run, out, no_figures):
    evaluate(run, *QUICK, "--seed", 7, "--loops", 6, out=out)
    found = results(out)
    weights = checkpoint.latest(run) / checkpoint.MODEL
    assert found["runs"]["looped"] == {
        "checkpoint": str(weights.parent),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "step": 8,
        "trained_loops": 4,
        "loops": [6],
    }
    assert (found["prompts"], found["seed"], found["loops"]["prompts"]) == (20, 7, 20)
    assert found["task"] == "LinearRegression(n_dims=3)"
    assert found["versions"]["torch"] == importlib.metadata.version("torch")


def test_it_repeats_byte_for_byte_under_a_seed(run, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert evaluate(run, *QUICK, "--seed", seed, out=tmp_path / name) == 0
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    for name in files:
        once, again, other = (
            (tmp_path / folder / name).read_bytes() for folder in ("one", "again", "other")
        )
        assert once == again, name
        assert once != other, name


def test_several_runs_share_figures_and_only_looped_ones_have_loops(run, tmp_path, out):
    standard = make_run(tmp_path / "standard", **STANDARD)
    other = make_run(tmp_path / "more" / "looped", n_loops=3, window=3)
    assert evaluate(run, standard, other, *QUICK, "--loops", 3, 2, out=out) == 0
    found = results(out)
    of_run, of_other = [f"{run}, 3 loops", f"{run}, 2 loops"], [other, f"{other}, 2 loops"]
    assert list(found["positions"])[:5] == [*of_run, "standard", *of_other]  # two named looped
    assert list(found["loops"]["curves"]) == [run, other]
    assert [r["loops"] for r in found["runs"].values()] == [[3, 2], [1], [3, 2]]


def test_trees_are_looped_as_far_as_in_the_official_figure(tmp_path, out):
    run = make_run(tmp_path / "tree", task="dt", task_options={"depth": 2})
    assert evaluate(run, *QUICK, out=out) == 0
    assert list(results(out)["positions"])[:2] == ["tree", "tree, 200 loops"]


def test_a_checkpoint_is_evaluated_as_its_run(run, tmp_path, out, no_figures):
    evaluate(run, *QUICK, out=out)
    evaluate(checkpoint.latest(run), *QUICK, out=tmp_path / "by_checkpoint")
    mine = results(out)["positions"]["looped"]
    assert results(tmp_path / "by_checkpoint")["positions"]["looped-step-00000008"] == mine


def test_a_checkpoint_is_named_by_its_run_from_within_its_folder_too(
    run, tmp_path, out, monkeypatch, no_figures
):
    step = checkpoint.latest(run)
    monkeypatch.chdir(step.parent)
    assert evaluate(step.name, *QUICK, out=out) == 0
    assert "looped-step-00000008" in results(out)["positions"]


def test_a_pretrained_model_is_evaluated_by_its_name(
    run, tmp_path, out, monkeypatch, capsys, no_figures
):
    monkeypatch.setattr("looped_fast.pretrained.weights._FOLDER", tmp_path / "shipped")
    shutil.copytree(checkpoint.latest(run), tmp_path / "shipped" / "lr-mini")
    assert evaluate("lr-mini", *QUICK, out=out) == 0
    assert "lr-mini" in results(out)["positions"]
    assert evaluate("lr-min", *QUICK, out=out) == 2
    assert "lr-min does not exist" in (error := capsys.readouterr().err)
    assert "a pretrained model: lr-mini" in error


def test_no_baselines_no_loops(run, out):
    quick = ["--prompts", "20", "--max-loops", "0", "--baselines", "none"]
    assert evaluate(run, *quick, out=out) == 0
    assert list(results(out)["positions"]) == ["looped", FAR]
    assert not (out / "loops.csv").exists()


def test_the_sweep_over_distributions_has_a_panel_for_each(run, out):
    assert evaluate(run, "--ood", *QUICK, out=out) == 0
    assert {file.name for file in out.iterdir()} == {
        f"ood.{k}" for k in ("json", "csv", "pdf", "png")
    }
    shifts = results(out, "ood")["shifts"]
    assert list(shifts) == list(SHIFTS)
    lengths = {name: len(curves["looped"]["mean"]) for name, curves in shifts.items()}
    assert lengths.pop("longer prompts") == 7  # all positions of the model
    assert lengths.pop("orthogonal queries") == 3  # d
    assert set(lengths.values()) == {5}


def test_a_sweep_over_distributions_has_quick_baselines_or_none(tmp_path, out, no_figures):
    run = make_run(tmp_path / "looped", n_points=3)
    for choice, names in {
        (): ["looped", "least squares", "3-nearest neighbours"],
        ("--baselines", "none", "--loops", "1", "4"): ["looped, 1 loops", "looped"],
    }.items():
        assert evaluate(run, "--ood", "--prompts", 20, *choice, out=out) == 0
        found = results(out, "ood")
        assert all(list(curves) == names for curves in found["shifts"].values())
    assert found["runs"]["looped"]["loops"] == [1, 4]


def test_shifts_show_in_least_squares(tmp_path, out, no_figures):
    """Orthogonal queries carry nothing of earlier points, and overlapping ones repeat them."""
    run = make_run(tmp_path / "looped", n_points=7)
    evaluate(run, "--ood", "--prompts", 200, out=out)
    shifts = results(out, "ood")["shifts"]
    assert "longer prompts" not in shifts  # the model has no more positions
    at_2 = {name: curves["least squares"]["mean"][2] for name, curves in shifts.items()}
    last = {name: curves["least squares"]["mean"][-1] for name, curves in shifts.items()}
    assert at_2["orthogonal queries"] == pytest.approx(1, abs=0.3)
    assert at_2["overlapping queries"] < 1e-8
    assert at_2["lower dimension"] < 1e-8 < 0.1 < at_2["none"]  # 1 of 3 dimensions is left
    assert at_2["inputs x 3"] == pytest.approx(at_2["weights x 1/3"], rel=1e-3)
    assert last["none"] < 1e-8 < 1e-3 < last["label noise"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "19"], "prompts = 19: at least 20"),
        (["--loop-prompts", "1"], "loop_prompts = 1: at least 20"),
        (["--seed", "-1"], "seed = -1: at least 0"),
        (["--loops", "3", "0"], "loops = 0: at least 1"),
        (["--max-loops", "-5"], "max_loops = -5: at least 0"),
        (["--points", "1"], "points = 1: at least 2"),
        (["--points", "8"], "points = 8 exceeds the 7 positions of looped; lower --points"),
        (["--device", "tpu"], "device 'tpu'"),
    ],
)
def test_settings_that_do_not_fit_are_errors(run, out, arguments, message, capsys):
    assert evaluate(run, *arguments, out=out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_classifier_of_tabular_sets_is_an_error(tmp_path, out, capsys):
    run = make_run(tmp_path / "looped")
    index = checkpoint.latest(run) / checkpoint.INDEX
    document = json.loads(index.read_text())
    document["config"] |= {"data": "offline", "held_out": "iris"}
    index.write_text(json.dumps(checkpoint_read.sealed(document)))
    assert evaluate(run, out=out) == 2
    assert "tabular sets; python -m looped_fast.openml evaluates it" in capsys.readouterr().err


def test_an_unknown_run_is_an_error(tmp_path, out, capsys):
    assert evaluate(tmp_path / "nowhere", out=out) == 2
    assert "nowhere does not exist; give the folder of a run" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path, out, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    assert evaluate(tmp_path, out=out) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_runs_of_different_tasks_are_an_error(run, tmp_path, out, capsys):
    other = make_run(tmp_path / "tree", task="dt", task_options={"depth": 2})
    assert evaluate(run, other, out=out) == 2
    error = capsys.readouterr().err
    assert "tree was trained on DecisionTree(n_dims=3, depth=2)" in error
    assert "separate commands" in error


def test_no_run_is_an_error(out, capsys):
    assert evaluate(out=out) == 2
    assert "no run is given" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_an_error(run, out, capsys):
    weights = checkpoint.latest(run) / checkpoint.MODEL
    weights.write_bytes(weights.read_bytes()[:-4])
    assert evaluate(run, out=out) == 1
    assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_an_error_and_nothing_is_written(
    tmp_path, out, capsys, number
):
    run = make_run(tmp_path / "diverged", fill=number)
    assert evaluate(run, *QUICK, out=out) == 1
    error = capsys.readouterr().err
    assert f"{checkpoint.latest(run) / checkpoint.MODEL}: _read_in.weight holds" in error
    assert "so training diverged" in error
    assert not out.exists()


def test_one_checkpoint_under_two_names_is_an_error(run, out, capsys, monkeypatch):
    monkeypatch.chdir(Path(run).parent)
    for again in (run, "looped", "./looped/", checkpoint.latest(run)):
        assert evaluate(run, again, *QUICK, out=out) == 2
        assert f"{again} is the same checkpoint as {run}, " in capsys.readouterr().err
    assert evaluate("lr-small", "lr-small", *QUICK, out=out) == 2
    assert "lr-small is the same checkpoint as lr-small" in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    tmp_path, out, capsys, monkeypatch
):
    run = make_run(tmp_path / "tree", task="dt", task_options={"depth": 2})
    monkeypatch.setitem(sys.modules, "sklearn.tree", None)
    assert evaluate(run, "--prompts", 20, out=out) == 1
    assert "pip install scikit-learn pandas xgboost" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_an_error(run, tmp_path, capsys):
    shutil.copy(__file__, tmp_path / "file")
    assert evaluate(run, *QUICK, out=tmp_path / "file" / "out") == 1
    assert "file" in capsys.readouterr().err
