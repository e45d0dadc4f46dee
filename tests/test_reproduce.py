"""``python -m looped_fast.reproduce``: figures from what there is; the rest is named."""

import dataclasses
import json

import pytest
import torch

from looped_fast import (
    LoopedTransformer,
    checkpoint,
    evaluate,
    openml,
    published,
    reproduce,
    results_page,
    sweep,
)
from looped_fast.presets import preset_config
from looped_fast.settings import config_from_dict
from looped_fast.tabular_data import OPENML_IDS

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
    monkeypatch.setattr(evaluate, "figure_baselines", lambda task: evaluate.QUICK_BASELINES)


def run(work, *figures, prompts=32):
    line = ["--preset", "tiny", "--prompts", str(prompts), "--probe-steps", "2"]
    return reproduce.main([*figures, *line, "--work", str(work), "--out", str(work / "docs")])


def page(work):
    return (work / "docs" / "results.md").read_text()


def test_a_figure_is_made_of_the_models_there_are_and_names_the_others(quick, tmp_path, capsys):
    save_run(tmp_path)
    assert run(tmp_path, "lr") == 3
    how = f"--task lr --model standard --preset tiny --out {tmp_path}/runs/lr-standard-tiny"
    assert f"python -m looped_fast.train {how}" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "docs" / "results" / "lr.json").read_text())
    assert len(numbers["positions"]["looped"]["mean"]) == 11
    assert len(numbers["loops"]["curves"]["looped"]["mean"]) == 40
    assert "standard" not in numbers["positions"]
    assert 100 < (tmp_path / "docs" / "results" / "lr.png").stat().st_size < 100_000
    text = page(tmp_path)
    assert how in text
    assert "d = 5, 32 prompts, seed 0; looped: D = 32, 1 block, b = 3, T = 2" in text
    assert f"{numbers['positions']['looped']['mean'][-1]:.4f}" in text
    assert "python -m looped_fast.reproduce dt" in text  # not asked for, and not there


def test_what_is_up_to_date_is_not_computed_again(quick, tmp_path, monkeypatch):
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


def test_shifts_and_probes_are_of_the_linear_regression_models(quick, tmp_path):
    for model in reproduce.MODELS:
        save_run(tmp_path, model=model)
    assert run(tmp_path, "ood", "probes") == 0
    text = page(tmp_path)
    assert "| inputs x 3 " in text
    assert "| here, looped " in text
    assert "| published, standard " in text
    for name in ("ood", "probes"):
        assert (tmp_path / "docs" / "results" / f"{name}.png").stat().st_size < 100_000


def sweep_document(scale="lr, tiny, 2 steps"):
    curve = {"mean": [1.0, 0.5], "low": [0.9, 0.4], "high": [1.1, 0.6]}
    result = {
        "n_loops": 2,
        "by_position": curve,
        "by_loops": [0.9, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.7],
    }
    runs = {"z + e": result, "standard": {**result, "n_loops": 1, "by_loops": [0.5]}}
    return {
        "name": "injection", "question": "Why?", "scale": scale, "prompts": 32, "seed": 1,
        "runs": runs,
    }  # fmt: skip


def test_sweeps_that_were_run_are_shown_and_kept(tmp_path):
    folder = tmp_path / "sweeps" / "injection-lr-tiny"
    folder.mkdir(parents=True)
    (folder / sweep.RESULTS_FILE).write_text(json.dumps(sweep_document()))
    assert run(tmp_path, "ablations") == 3
    (folder / sweep.RESULTS_FILE).unlink()
    assert run(tmp_path, "ablations") == 3  # a fresh clone has the page's numbers, not the runs
    text = page(tmp_path)
    assert "Why? Scale: lr, tiny, 2 steps; 32 prompts, seed 1." in text
    assert "0.7000" in text  # at 4b
    assert "looped_fast.sweep heads" in text
    assert "looped_fast.sweep injection" not in text


def test_openml_results_are_set_beside_the_published_ones(tmp_path):
    folder = tmp_path / "openml" / "offline-tiny"
    folder.mkdir(parents=True)
    sets = {"wine": {"rows": 9, **{p: [0.75, 0.01] for p in openml.PREDICTORS}}}
    settings = {"preset": "tiny", "steps": 2, "test_seeds": 5}
    document = {"settings": settings, "torch": "2", "sets": sets}
    (folder / openml.RESULTS_FILE).write_text(json.dumps(document))
    assert run(tmp_path, "openml") == 0
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
    # The curriculum only grows dims here, which costs nothing: all steps but the first are alike.
    assert row["total_flops"] == pytest.approx(row["steps"] * row["flops"], rel=0.1)
    assert "**predictions**" in page(tmp_path)


def test_missing_models_are_trained_on_request(quick, tmp_path, monkeypatch):
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
    return {"positions": curves, "key": {"models": {"looped": {"n_dims": n_dims, "n_loops": 2}}}}


def test_claims_are_judged_by_the_numbers(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    lr = task_numbers(looped=[1, 0.009], standard=[1, 0.004])
    lr["loops"] = {"curves": {"looped": {"mean": [0.1] + [0.01] * 10 + [0.03] * 10}}}
    sparse = task_numbers(looped=[1, 1, 0.2, 0], **{"least squares": [1, 1, 0.5, 0]})
    relu = task_numbers(looped=[1, 0.23], **{"2-layer network": [1, 0.2]})
    for name, numbers in {"lr": lr, "sparse_lr": sparse, "relu_2nn": relu}.items():
        (folder / f"{name}.json").write_text(json.dumps(numbers))
    verdicts = {
        cells[1].strip(): cells[3].strip()
        for cells in (line.split("|") for line in results_page._claims(tmp_path).splitlines()[4:])
    }
    assert verdicts == {
        "lr: looped at most 2 x standard": "**no**",
        "lr: looped at most 0.01": "yes",
        "lr: error at 2b at most 2 x that at b": "yes",
        "lr: error at 10b at most 2 x that at b": "**no**",
        "sparse_lr: looped below least squares after d/2 examples": "yes",
        "relu_2nn: looped at most 1.1 x 2-layer network": "**no**",
    }


def test_a_claim_that_the_band_spans_is_left_open(tmp_path):
    (tmp_path / "results").mkdir()
    lr = task_numbers(looped=[1, 0.0099], standard=[1, 0.02])
    (tmp_path / "results" / "lr.json").write_text(json.dumps(lr))
    claims = results_page._claims(tmp_path)
    assert "0.0099 (0.0089 to 0.0104) | open: the 5-95 % band spans it |" in claims


def test_models_of_different_tasks_are_not_compared(quick, tmp_path, capsys):
    save_run(tmp_path)
    save_run(tmp_path, model="standard", n_dims=4)
    assert run(tmp_path, "lr") == 2
    assert "can't be compared" in capsys.readouterr().err


def test_an_unknown_figure_is_named(tmp_path, capsys):
    assert run(tmp_path, "lrr") == 2
    assert "did you mean 'lr'" in capsys.readouterr().err


def test_the_published_values_are_complete():
    assert all(len(curve) == 41 for curve in published.LINEAR_REGRESSION.values())
    assert published.LINEAR_REGRESSION["looped"][40] == pytest.approx(0.0007792, rel=1e-2)
    assert all(len(c) == 21 for curves in published.PROBES.values() for c in curves.values())
    assert all(len(pairs) == len(OPENML_IDS) for pairs in published.OPENML.values())
    # Accuracies of the first set are fractions of its 5 % split, which has 209 rows.
    assert published.OPENML["looped"][0][0] * 209 * 5 == pytest.approx(692, abs=0.1)


def test_the_help_names_every_figure():
    figures = reproduce.Command.__doc__.split("Figures: ")[1].split(".")[0]
    assert figures.split(", ") == list(reproduce.FIGURES)
    assert dataclasses.fields(reproduce.Command)[0].name == "figures"
