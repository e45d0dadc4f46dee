"""Tabular sets, and the experiment that leaves each of them out in turn."""

import csv
import json
import socket
import sys
import time
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FP32_EPS

from looped_fast.paper import openml, tabular_data
from looped_fast.paper.openml import Command, TabularTrainer, tabular_config
from looped_fast.paper.tabular_data import (
    DownloadError,
    held_out_prompts,
    load_sets,
    tabular_set,
    training_prompts,
)
from looped_fast.pretrained.runs import load_run
from looped_fast.training import checkpoint

pandas = pytest.importorskip("pandas", reason="needs the extra eval")
sklearn = pytest.importorskip("sklearn", reason="needs the extra eval")


def separable(name="apart", rows=60, d=3):
    """One column decides; the others are noise."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(rows, d))
    target = np.where(np.arange(rows) % 2, "yes", "no")
    features[:, 0] = np.where(target == "yes", 3, -3)
    return tabular_set(name, features, target)


def test_features_are_standardised_and_classes_numbered():
    made = tabular_set("s", [[1, 5], [2, 5], [3, 5], [6, 5]], ["b", "a", "b", "a"])
    assert made.labels.tolist() == [1, 0, 1, 0]
    assert abs(made.xs[:, 0].mean().item()) < 4 * FP32_EPS
    assert made.xs[:, 0].std(correction=0).item() == pytest.approx(1, abs=4 * FP32_EPS)
    assert made.xs[:, 1].tolist() == [0] * 4  # constant: no division by zero


@pytest.mark.parametrize(
    ("features", "target", "message"),
    [
        ([[1.0], [np.nan], [np.nan]], [0, 1, 0], "'s' has 2 missing .* in 1 columns; drop"),
        ([[1.0], [np.inf]], [0, 1], "'s' has 1 missing or infinite"),
        ([[1.0], [2.0]], [1, 1], r"'s' has 1 class \(1\); two are needed"),
        ([[1.0], [2.0], [3.0]], ["x", "y", "z"], r"'s' has 3 classes \(x, y, z\)"),
        ([[1.0], [2.0], [3.0]], ["x", None, "y"], "'s' lacks 1 of 3 labels; drop those rows"),
        ([[1.0], [2.0], [3.0]], [0.0, np.nan, np.nan], "'s' lacks 2 of 3 labels"),
        ([[1.0], [2.0]], pandas.Series(["x", pandas.NA], dtype="string"), "'s' lacks 1 of 2"),
        (
            [[1.0, "red"], [2.0, "blue"]],
            [0, 1],
            "'s' has features that are no numbers .*'red'.*; drop those columns or encode",
        ),
    ],
)
def test_a_set_that_is_not_two_complete_classes_is_refused(features, target, message):
    with pytest.raises(ValueError, match=message):
        tabular_set("s", features, target)


def test_a_prompt_holds_distinct_rows_of_one_set_after_zeros():
    sets = [separable("a", rows=30), separable("b", rows=40)]
    seen = set()
    for step in range(20):
        xs, ys = training_prompts(sets, 4, 8, 5, seed=0, step=step)
        assert (xs.shape, ys.shape) == ((4, 8, 5), (4, 8))
        assert not xs[..., :2].any()
        assert torch.equal(xs[..., 2] > 0, ys.bool())
        sources = [s for s in sets if (s.xs == xs[0, 0, 2:]).all(1).any()]
        (source,) = sources
        seen.add(source.name)
        for prompt in xs[..., 2:]:
            rows = (prompt[:, None] == source.xs).all(-1).nonzero()[:, 1]
            assert len(rows) == len(rows.unique()) == 8
    assert seen == {"a", "b"}
    again = training_prompts(sets, 4, 8, 5, seed=0, step=19)
    assert torch.equal(again.xs, xs)


def test_each_row_is_queried_once_with_others_as_its_context():
    tested = separable(rows=12)
    xs, _ = held_out_prompts(tested, 12, 3, rows=100, seed=3)
    assert xs.shape == (12, 12, 3)  # the set has 12 rows
    for prompt in xs:  # as long as the set: every row appears once
        assert torch.equal(prompt.sort(0).values, tested.xs.sort(0).values)
    assert torch.equal(xs[:, -1].sort(0).values, tested.xs.sort(0).values)
    assert len(held_out_prompts(tested, 5, 3, rows=7, seed=3).ys) == 7
    other = held_out_prompts(tested, 12, 3, rows=100, seed=4)
    assert not torch.equal(other.xs, xs)


@pytest.mark.parametrize(
    ("n_points", "n_dims", "message"),
    [
        (61, 3, "60 rows, a prompt needs 61; lower n_points"),
        (5, 2, "3 features, the model takes 2"),
    ],
)
def test_a_set_that_does_not_fit_a_prompt_is_refused(n_points, n_dims, message):
    with pytest.raises(ValueError, match=message):
        training_prompts([separable()], 4, n_points, n_dims, seed=0, step=0)
    with pytest.raises(ValueError, match=message):
        held_out_prompts(separable(), n_points, n_dims, rows=5, seed=0)


def test_ten_sets_need_no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    sets = load_sets("offline")
    assert len({s.name for s in sets}) == 10
    for each in sets:
        n_rows, d = each.xs.shape
        minority = min(each.labels.mean().item(), 1 - each.labels.mean().item())
        assert n_rows >= 41  # a prompt of the paper
        assert d <= 20
        assert minority >= 1 / 3 - 0.01  # the paper's rule: at least half of the other class


def test_an_openml_set_keeps_its_numeric_columns(monkeypatch):
    frame = pandas.DataFrame({"a": [1.0, 2.0, 3.0], "b": pandas.Categorical(["u", "v", "u"])})
    fetched = []

    def fetch(*, data_id, as_frame):
        fetched.append(data_id)
        return SimpleNamespace(data=frame, target=pandas.Series(["N", "P", "P"]))

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    sets = load_sets("openml")
    assert fetched == list(tabular_data.OPENML_IDS.values())
    assert all(s.xs.shape == (3, 1) and s.labels.tolist() == [0, 1, 1] for s in sets)


def test_a_set_of_the_cache_that_cant_be_used_is_named_with_its_folder(tmp_path, monkeypatch):
    frame = pandas.DataFrame({"a": [1.0, np.nan, 3.0]})
    answer = SimpleNamespace(data=frame, target=pandas.Series(["N", "P", "P"]))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda **_: answer)
    with pytest.raises(ValueError, match=rf"OpenML set 720, kept in {tmp_path}: set 'abalone' has"):
        load_sets("openml")


@pytest.mark.filterwarnings("ignore:A network error occurred")
def test_a_failed_download_says_what_to_do_and_leaves_the_cache_alone(
    tmp_path, monkeypatch, capsys
):
    def no_network(*args, **kwargs):
        raise socket.gaierror("no such host")

    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between scikit-learn's retries
    cached = tmp_path / "openml" / "openml.org" / "data" / "one.gz"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"fetched before")
    with pytest.raises(DownloadError, match=r"set 720 \(abalone\).*--data offline"):
        load_sets("openml")
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [cached]
    assert cached.read_bytes() == b"fetched before"
    assert openml.main(["--data", "openml", "--out", str(tmp_path / "out")]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(("collection", "package"), [("openml", "pandas"), ("offline", "sklearn")])
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    collection, package, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    monkeypatch.setitem(sys.modules, package, None)
    assert openml.main(["--data", collection, "--out", str(tmp_path / "out")]) == 1
    assert "pip install scikit-learn pandas xgboost" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_collection_is_named():
    with pytest.raises(ValueError, match="did you mean 'offline'"):
        load_sets("ofline")


def test_paper_scale_is_that_of_the_official_script():
    config = tabular_config("paper", "looped", "openml", "wind")
    assert (config.n_loops, config.window, config.steps, config.batch_size) == (30, 15, 100_000, 40)
    stage = config.make_curriculum().at(0)
    assert (stage.n_dims, stage.n_points, stage.n_loops) == (20, 41, 15)
    assert tabular_config("paper", "standard", "openml", "wind").n_layer == 12


def tiny_config(model="looped", **changes):
    config = tabular_config("tiny", model, "offline", "apart", steps=60)
    small = {"n_embd": 32, "n_head": 2, "n_points": 8, "n_loops": 3, "window": 2}
    if model == "standard":
        small |= {"n_loops": 1, "window": 1, "n_layer": 2}
    return openml.dataclasses.replace(config, **{**small, **changes})


def test_the_loss_is_cross_entropy_of_every_prediction_in_the_window(tmp_path):
    sets = [separable("apart"), separable("other")]
    trainer = TabularTrainer(tiny_config(n_points=8), sets, tmp_path)
    trainer._set_inputs()
    loss, coin = trainer._loss(8, 3)
    xs, ys = training_prompts(sets[1:], 40, 8, 20, seed=42, step=0)
    logits = trainer.model(xs, ys, 3, 2).double()
    picked = logits.log_softmax(-1).gather(-1, ys.long().expand(2, -1, -1)[..., None])
    assert loss.item() == pytest.approx(-picked.mean().item(), rel=16 * FP32_EPS)
    assert coin.item() == pytest.approx(np.log(2))


def test_a_model_learns_to_classify_a_set_it_never_saw(tmp_path):
    sets = [separable("apart"), separable("other", rows=80), separable("third", rows=50)]
    trainer = TabularTrainer(tiny_config(warmup_steps=5), sets, tmp_path)
    assert {s.name for s in trainer.training_sets} == {"other", "third"}
    trainer.fit()
    assert trainer.is_wrong(60, 3, seed=0)[:, -1].float().mean() < 0.1


def test_the_command_compares_both_models_on_each_set(tmp_path, monkeypatch, capsys):
    sets = [separable("one"), separable("two", rows=50)]
    monkeypatch.setitem(tabular_data.COLLECTIONS, "offline", lambda: sets)
    line = ["--preset", "tiny", "--steps", "1", "--test-rows", "20", "--test-seeds", "2"]
    assert openml.main([*line, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "openml.json").read_text())["sets"]
    assert list(results) == ["one", "two"]
    assert results["one"]["rows"] == 20
    assert results["one"]["3-nearest neighbours"][0] > 0.8
    weights = checkpoint.latest(tmp_path / "standard-two") / checkpoint.MODEL
    assert results["two"]["sha256"]["standard"] == sha256(weights.read_bytes()).hexdigest()
    versions = json.loads((tmp_path / "openml.json").read_text())["versions"]
    assert versions["scikit-learn"] == sklearn.__version__
    with (tmp_path / "openml.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 4
    assert (tmp_path / "openml.png").read_bytes().startswith(b"\x89PNG")
    assert "mean" in capsys.readouterr().out
    # Again: nothing is trained twice, and the numbers are the same.
    monkeypatch.setattr(TabularTrainer, "training_step", None)
    assert openml.main([*line, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "openml.json").read_text())["sets"] == results
    assert openml.main([*line, "--seed", "1", "--out", str(tmp_path)]) == 2
    assert "seed 42 -> 1" in capsys.readouterr().err
    assert openml.main([*line, "--test-sets", "tow", "--out", str(tmp_path)]) == 2
    assert "did you mean 'two'" in capsys.readouterr().err


def test_a_tabular_run_is_not_taken_for_one_of_linear_regression(tmp_path):
    trainer = TabularTrainer(tiny_config(), [separable("apart"), separable("other")], tmp_path)
    trainer.save()
    with pytest.raises(ValueError, match=r"tabular sets; python -m looped_fast\.openml evaluates"):
        load_run(tmp_path)


def test_no_seed_to_test_with_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="test_seeds = 0"):
        openml.run(Command(test_seeds=0), [separable()], tmp_path)
