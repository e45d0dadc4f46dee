"""``python -m looped_fast.reproduce``: figures from the models that exist; others are named."""

import dataclasses
import importlib.metadata
import json

import pytest
import torch
from matplotlib.axes import Axes

from looped_fast import LoopedTransformer, evaluate
from looped_fast.evaluation.baselines import QUICK_BASELINES
from looped_fast.evaluation.figures import OFFICIAL_LOOPS
from looped_fast.paper import openml, published, reproduce, results_figures, results_page, sweep
from looped_fast.paper.tabular_data import OPENML_IDS
from looped_fast.training import checkpoint
from looped_fast.training.config import config_from_dict
from looped_fast.training.presets import preset_config

SMALL = {"n_embd": 32, "n_head": 2, "n_points": 11, "n_positions": 11, "n_loops": 3, "window": 2}


def save_run(work, task="lr", model="looped", **changes):
    """A model of preset tiny after 5 of 5 steps, where ``reproduce`` looks for it."""
    depth = {"n_loops": 1, "window": 1, "n_layer": 2} if model == "standard" else {}
    settings = {**SMALL, **depth, "steps": 5, **changes}
    config = config_from_dict(settings, preset_config("tiny", task, model))
    learner = LoopedTransformer(config.model_config())
    checkpoint.save(
        work / "runs" / f"{task}-{model}-tiny", 5, learner,
        torch.optim.Adam(learner.parameters()), config=config.to_dict(),
    )  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(reproduce, "LOOPS", 40)
    for task in OFFICIAL_LOOPS:
        monkeypatch.setitem(OFFICIAL_LOOPS, task, 30)
    for module in (evaluate, reproduce):
        monkeypatch.setattr(module, "figure_baselines", lambda task: QUICK_BASELINES)


@pytest.fixture
def no_figures(monkeypatch):
    """Skip the drawing, in tests that compute a figure several times."""
    monkeypatch.setattr(reproduce, "draw", lambda *_: None)


def run(work, *figures, prompts=32):
    line = ["--preset", "tiny", "--prompts", str(prompts), "--probe-steps", "2"]
    return reproduce.main([*figures, *line, "--work", str(work), "--out", str(work / "docs")])


def page(work):
    return (work / "docs" / "results.md").read_text()


def test_a_figure_is_made_of_existing_models_and_names_the_others(quick, tmp_path, capsys):
    save_run(tmp_path)
    assert run(tmp_path, "lr") == 3
    how = f"--task lr --model standard --preset tiny --out {tmp_path}/runs/lr-standard-tiny"
    assert f"python -m looped_fast.train {how}" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "docs" / "results" / "lr.json").read_text())
    assert len(numbers["positions"]["looped"]["mean"]) == 11
    assert len(numbers["loops"]["curves"]["looped"]["mean"]) == 40
    assert numbers["positions"]["looped, 30 loops"] != numbers["positions"]["looped"]
    assert "standard" not in numbers["positions"]
    assert 100 < (tmp_path / "docs" / "results" / "lr.png").stat().st_size < 100_000
    text = page(tmp_path)
    assert how in text
    assert "d = 5, 32 prompts, seed 0; looped: D = 32, 1 block, b = 3, T = 2" in text
    assert f"{numbers['positions']['looped']['mean'][-1]:.4f}" in text
    assert "| looped, 30 loops " in text
    assert "(b = 3), at the last position, 32 prompts:" in text
    assert f"scikit-learn {importlib.metadata.version('scikit-learn')}" in text
    assert "python -m looped_fast.reproduce dt" in text  # not asked for, and not there


def test_what_is_up_to_date_is_not_computed_again(quick, no_figures, tmp_path, monkeypatch):
    for model in reproduce.MODELS:
        save_run(tmp_path, model=model)
    assert run(tmp_path, "lr") == 0
    before = (tmp_path / "docs" / "results" / "lr.json").read_bytes()
    calls = []
    whole = evaluate.evaluate_positions
    monkeypatch.setattr(evaluate, "evaluate_positions", lambda *a: calls.append(a) or whole(*a))
    assert run(tmp_path, "lr") == 0
    assert calls == []
    assert (tmp_path / "docs" / "results" / "lr.json").read_bytes() == before
    assert run(tmp_path, "lr", prompts=33) == 0
    assert len(calls) == 1
    save_run(tmp_path)  # other weights
    assert run(tmp_path, "lr", prompts=33) == 0
    assert len(calls) == 2


def test_baselines_stay_when_models_change_and_not_when_their_packages_do(
    quick, no_figures, tmp_path, monkeypatch
):
    calls = []

    def counted(xs, ys):
        calls.append(len(xs))
        return torch.zeros_like(ys)

    monkeypatch.setitem(QUICK_BASELINES, "least squares", counted)
    save_run(tmp_path)
    run(tmp_path, "lr")
    path = tmp_path / "docs" / "results" / "lr.json"
    before = json.loads(path.read_text())["positions"]
    assert calls == [32]
    torch.manual_seed(1)
    save_run(tmp_path)
    run(tmp_path, "lr")
    after = json.loads(path.read_text())["positions"]
    assert calls == [32]
    assert after["least squares"] == before["least squares"]
    assert after["looped"] != before["looped"]
    run(tmp_path, "probes")
    probes = (tmp_path / "docs" / "results" / "probes.json").read_bytes()
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9" if name == "xgboost" else version(name)
    )
    run(tmp_path, "lr", "probes")
    assert calls == [32, 32]
    assert (tmp_path / "docs" / "results" / "probes.json").read_bytes() == probes


def test_shifts_and_probes_are_of_the_linear_regression_models(quick, tmp_path):
    for model in reproduce.MODELS:
        save_run(tmp_path, model=model)
    assert run(tmp_path, "ood", "probes") == 0
    text = page(tmp_path)
    after = {
        cells[1].strip(): cells[2].strip()
        for cells in (line.split("|") for line in text.splitlines() if line.startswith("| "))
    }
    assert (after["inputs x 3"], after["orthogonal queries"]) == ("10", "4")
    assert "| here, looped " in text
    assert "| published, standard " in text
    for name in ("ood", "probes"):
        assert (tmp_path / "docs" / "results" / f"{name}.png").stat().st_size < 100_000


def sweep_document(scale="lr, tiny, 2 steps"):
    curve = {"mean": [1.0, 0.5], "low": [0.9, 0.4], "high": [1.1, 0.6]}
    result = {
        "n_loops": 2,
        "sha256": 64 * "a",
        "by_position": curve,
        "by_loops": [0.9, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.7],
    }
    runs = {"z + e": result, "standard": {**result, "n_loops": 1, "by_loops": [0.5]}}
    return {
        "name": "injection", "question": "Why?", "scale": scale, "prompts": 32, "seed": 1,
        "runs": runs, "versions": {"torch": "2"},
    }  # fmt: skip


def test_sweeps_that_were_run_are_shown_and_kept(tmp_path):
    folder = tmp_path / "sweeps" / "injection-lr-tiny"
    folder.mkdir(parents=True)
    (folder / sweep.RESULTS_FILE).write_text(json.dumps(sweep_document()))
    assert run(tmp_path, "ablations") == 3
    (folder / sweep.RESULTS_FILE).unlink()
    assert run(tmp_path, "ablations") == 3  # a fresh clone has the page's numbers, not the runs
    text = page(tmp_path)
    assert "Why? Scale: lr, tiny, 2 steps; 32 prompts, seed 1; torch 2." in text
    assert "| aaaaaaaaaaaa |" in text
    assert "0.7000" in text  # at 4b
    assert "looped_fast.sweep heads" in text
    assert "looped_fast.sweep injection" not in text


def test_a_sweep_at_another_scale_is_shown_and_does_not_count(tmp_path):
    folder = tmp_path / "sweeps" / "injection-lr-small"
    folder.mkdir(parents=True)
    (folder / sweep.RESULTS_FILE).write_text(json.dumps(sweep_document()))
    assert run(tmp_path, "ablations") == 3
    assert "**injection-lr-small**" in page(tmp_path)
    assert "looped_fast.sweep injection --preset tiny" in page(tmp_path)


def test_openml_results_are_set_beside_the_published_ones(tmp_path):
    folder = tmp_path / "openml" / "offline-tiny"
    folder.mkdir(parents=True)
    sets = {"wine": {"rows": 9, **{p: [0.75, 0.01] for p in openml.PREDICTORS}}}
    settings = {"preset": "tiny", "steps": 2, "test_seeds": 5}
    document = {"settings": settings, "versions": {"torch": "2"}, "sets": sets}
    (folder / openml.RESULTS_FILE).write_text(json.dumps(document))
    assert run(tmp_path, "openml") == 0
    # These are not the paper's sets, so its experiment is still missing.
    line = ["openml", "--preset", "paper", "--work", str(tmp_path), "--out", str(tmp_path / "docs")]
    assert reproduce.main(line) == 3
    how = f"looped_fast.openml --data openml --preset paper --out {tmp_path}/openml/openml-paper"
    assert how in page(tmp_path)
    assert "0.750" in page(tmp_path)
    assert "0.565" in page(tmp_path)  # the published mean of the looped model


def test_hours_are_predicted_from_the_measured_step(tmp_path, monkeypatch):
    paper = {
        (task, model): preset_config("tiny", task, model)
        for task in results_page.TASKS
        for model in reproduce.MODELS
    }
    monkeypatch.setattr(reproduce, "preset_config", lambda _, task, model: paper[task, model])
    assert run(tmp_path, "speed") == 0
    row = json.loads((tmp_path / "docs" / "results" / "speed.json").read_text())["steps"][
        "lr, looped"
    ]
    assert 0 < row["seconds"] < 60
    # The curriculum grows only dims here, which costs nothing: all steps but the first are equal.
    assert row["total_flops"] == pytest.approx(row["steps"] * row["flops"], rel=0.1)
    assert "**predictions**" in page(tmp_path)


def test_missing_models_are_trained_on_request(quick, no_figures, tmp_path, monkeypatch):
    lines = []

    def train(line):
        lines.append(line)
        save_run(tmp_path, line[1], line[3])
        return 0

    monkeypatch.setattr(reproduce.train, "main", train)
    assert run(tmp_path, "sparse_lr", "--train") == 0
    assert [line[3] for line in lines] == ["looped", "standard"]
    save_run(tmp_path, "sparse_lr", steps=9)  # stopped at 5
    monkeypatch.setattr(reproduce.train, "main", lambda line: lines.append(line) or 0)
    assert run(tmp_path, "sparse_lr", "--train") == 0
    assert lines[2:] == [["--resume", str(tmp_path / "runs" / "sparse_lr-looped-tiny")]]
    monkeypatch.setattr(reproduce.train, "main", lambda line: 130)
    assert run(tmp_path, "dt", "--train") == 1


def task_numbers(n_dims=4, **errors):
    curves = {
        who: {
            "mean": values,
            "low": [0.9 * v for v in values],
            "high": [1.05 * v for v in values],
        }
        for who, values in errors.items()
    }
    looped = {"n_dims": n_dims, "n_loops": 2, "depth": None}
    return {"positions": curves, "key": {"models": {"looped": looped}}}


def test_claims_are_judged_by_the_numbers(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (tmp_path / "recipes.md").touch()
    lr = task_numbers(looped=[1, 0.009], standard=[1, 0.004])
    lr["loops"] = {"curves": {"looped": {"mean": [0.1] + [0.01] * 10 + [0.03] * 10}}}
    sparse = task_numbers(looped=[1, 1, 0.2, 0], **{"least squares": [1, 1, 0.5, 0]})
    relu = task_numbers(looped=[1, 0.23], **{"2-layer network": [1, 0.2]})
    for name, numbers in {"lr": lr, "sparse_lr": sparse, "relu_2nn": relu}.items():
        (folder / f"{name}.json").write_text(json.dumps(numbers))
    verdicts = {
        cells[1].strip(): cells[4].strip()
        for cells in (line.split("|") for line in results_page._claims(tmp_path).splitlines()[4:])
    }
    assert verdicts == {
        "lr: looped at most 2 x standard": NO,
        "lr: looped at most 0.01": "yes",
        "lr: error at 2b at most 2 x that at b": "yes",
        "lr: error at 10b at most 2 x that at b": NO,
        "sparse_lr: looped below least squares after d/2 examples": "yes",
        "relu_2nn: looped at most 1.1 x 2-layer network": NO,
    }


NO = "**no**; [curves of the recipes tried](recipes.md)"


def test_a_no_of_models_that_do_not_ship_has_no_recipes_to_show(tmp_path):
    (tmp_path / "results").mkdir()
    lr = task_numbers(looped=[1, 0.02], standard=[1, 0.02])
    (tmp_path / "results" / "lr.json").write_text(json.dumps(lr))
    assert "| **no** " in results_page._claims(tmp_path)


def test_claims_show_the_looped_error_as_far_as_published_too(tmp_path):
    (tmp_path / "results").mkdir()
    curves = {"looped": [1, 0.2], "looped, 200 loops": [1, 0.0625], "3-nearest neighbours": [1, 1]}
    (tmp_path / "results" / "dt.json").write_text(json.dumps(task_numbers(**curves)))
    row = results_page._claims(tmp_path).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["0.200 and 1.000", "0.0625", "yes"]


@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ({"looped": 0.1, "standard": 0.2, "XGBoost, signs": 0.3}, "here the same."),
        (
            {"looped": 0.3, "standard": 0.2, "XGBoost, signs": 0.1, "greedy tree, signs": 0},
            "here **another**, XGBoost, signs < standard < looped.",
        ),
        ({"looped, 200 loops": 0.1, "looped": 0.3, "standard": 0.2}, "after 200 loops: published"),
    ],
)
def test_trees_say_whether_the_published_order_holds(errors, found):
    numbers = task_numbers(**{who: [1, error] for who, error in errors.items()})
    sentence = results_page._order("dt", numbers)
    assert found in sentence
    assert "published looped < standard" in sentence
    assert results_page._order("dt", task_numbers(looped=[1, 0.1])) == ""


def test_a_claim_that_the_band_spans_is_left_open(tmp_path):
    (tmp_path / "results").mkdir()
    lr = task_numbers(looped=[1, 0.0099], standard=[1, 0.02])
    (tmp_path / "results" / "lr.json").write_text(json.dumps(lr))
    claims = results_page._claims(tmp_path)
    assert "| 0.0099 (0.0089 to 0.0104) |" in claims
    assert "| open: the 5-95 % band spans it |" in claims


def test_a_figure_is_set_beside_what_was_read_off_and_what_was_printed():
    assert "(d = 20, trees of depth 4): looped about 0.03" in results_page._published("dt")
    relu = results_page._published("relu_2nn")
    assert "0.1802" in relu
    assert "2-layer network about 0.18" in relu
    assert "are after 500 loops" in relu


def test_the_curves_found_here_have_bands(tmp_path, monkeypatch):
    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda *args, **style: bands.append(args[2]))
    numbers = task_numbers(looped=[1, 0.5], standard=[1, 0.25])
    results_figures._draw_task(tmp_path / "lr.png", "lr", numbers)
    assert bands == [[0.9, 0.45], [0.9, 0.225]]


def test_models_of_different_tasks_are_not_compared(quick, tmp_path, capsys):
    save_run(tmp_path)
    save_run(tmp_path, model="standard", n_dims=4)
    assert run(tmp_path, "lr") == 2
    assert "can't be compared" in capsys.readouterr().err


def test_an_unknown_figure_is_named(tmp_path, capsys):
    assert run(tmp_path, "lrr") == 2
    assert "did you mean 'lr'" in capsys.readouterr().err


def test_the_published_values_are_complete():
    for task, n in {"lr": 41, "sparse_lr": 41, "relu_2nn": 101}.items():
        assert all(len(curve) == n for curve in published.CURVES[task].values())
    assert published.CURVES["lr"]["looped"][40] == pytest.approx(0.0007792, rel=1e-2)
    sparse, relu = published.CURVES["sparse_lr"], published.CURVES["relu_2nn"]
    after_8 = [sparse[who][8] for who in ("looped", "standard", "lasso")]
    assert after_8 == pytest.approx([0.14709, 0.2210, 0.20558], rel=1e-2)
    assert (relu["looped"][100], relu["standard"][100]) == (0.1802, 0.1695)
    assert OFFICIAL_LOOPS.keys() == results_page.TASKS.keys()
    assert all(len(c) == 21 for curves in published.PROBES.values() for c in curves.values())
    assert all(len(pairs) == len(OPENML_IDS) for pairs in published.OPENML.values())
    # Accuracies of the first set are fractions of its 5 % split, which has 209 rows.
    assert published.OPENML["looped"][0][0] * 209 * 5 == pytest.approx(692, abs=0.1)


def test_the_help_names_every_figure():
    figures = reproduce.Command.__doc__.split("Figures: ")[1].split(".")[0]
    assert figures.split(", ") == list(reproduce.FIGURES)
    assert dataclasses.fields(reproduce.Command)[0].name == "figures"
