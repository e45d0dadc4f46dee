"""The task in settings: names, classes and paths, options, files of earlier versions."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from looped_fast import pretrained
from looped_fast.compat.config_files import load_config
from looped_fast.errors import CheckpointError
from looped_fast.tasks import LinearRegression, TaskNotImportedError
from looped_fast.training import checkpoint
from looped_fast.training.command_line import task_texts
from looped_fast.training.config import (
    TrainConfig,
    config_from_dict,
    saved_config,
    saved_model_config,
)
from looped_fast.training.presets import entry, preset_config
from looped_fast.training.task_settings import flat

PATH = f"{__name__}:Scaled"


@dataclass(frozen=True)
class Scaled(LinearRegression):
    scale: float
    kind: str | None = None
    halve: bool = False


def test_settings_hold_every_option_with_its_value():
    config = TrainConfig(task="dt")
    assert config.task_options == {"depth": 4}
    assert config.make_task().depth == 4
    assert TrainConfig(task="dt", task_options={"depth": 2}).make_task().depth == 2
    assert TrainConfig().task_options == {}


def test_a_class_is_named_by_its_path():
    config = TrainConfig(task=Scaled, task_options={"scale": 2})
    assert config.task == PATH
    assert config.task_options == {"scale": 2.0, "kind": None, "halve": False}
    assert config.make_task() == Scaled(20, 2.0)
    assert TrainConfig(task="looped_fast.tasks:DecisionTree").task == "dt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": PATH},
            "needs a value of its option scale, which has no default; give --task.sca",
        ),
        ({"task": "dt", "task_options": {"dept": 2}}, "did you mean 'depth'"),
        ({"task": int}, "task 'int' is no Task but class int"),
        ({"task": 3}, "task 3: a name is needed"),
        ({"task": "dt", "task_options": {"depth": 2.5}}, "task.depth = 2.5: int is needed"),
    ],
)
def test_a_wrong_task_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_another_task_starts_from_its_own_defaults():
    config = TrainConfig(task="sparse_lr", task_options={"sparsity": 7})
    for task in (
        dataclasses.replace(config, task="dt"),
        config_from_dict({"task": "dt"}, config),
        config_from_dict({"task": {"name": "dt"}}, config),
    ):
        assert task.task_options == {"depth": 4}
    assert dataclasses.replace(config, steps=3).task_options == {"sparsity": 7}
    assert config_from_dict({"task": "sparse_lr", "steps": 3}, config).task_options["sparsity"] == 7
    assert config_from_dict({"task": {"sparsity": 5}}, config).task_options == {"sparsity": 5}


def test_a_component_of_a_mixture_keeps_its_options_as_long_as_it_stays():
    second = {"frequencies": 5, "period": 3.0}
    options = {"second": "fourier", "second_options": second}
    config = TrainConfig(task="mixture", task_options=options)
    changed = config_from_dict({"task": {"second_options": {"period": 9}}}, config)
    assert changed.task_options["second_options"] == {"frequencies": 5, "period": 9.0}
    changed = config_from_dict({"task": {"second": "dt", "share": 0.1}}, config)
    assert changed.task_options["second_options"] == {"depth": 4}
    given = {"second": "dt", "second_options": {"depth": 3}}
    changed = config_from_dict({"task": given}, config)
    assert changed.task_options["second_options"] == {"depth": 3}
    assert dataclasses.replace(changed, n_dims=4).task_options == changed.task_options


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(task="dt", task_options={"depth": 3}),
        TrainConfig(task=Scaled, task_options={"scale": 0.5, "kind": "a"}),
        preset_config("tiny", "mixture"),
    ],
)
def test_settings_survive_files_and_pickling(config, tmp_path):
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), TrainConfig()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    assert load_config(path)[0].to_dict() | {"preset": 0} == config.to_dict() | {"preset": 0}


def test_files_hold_the_task_with_its_options():
    assert TrainConfig(task="dt").to_dict()["task"] == {"name": "dt", "depth": 4}
    assert TrainConfig().to_dict()["task"] == {"name": "lr"}
    names = flat(preset_config("tiny", "mixture").to_dict())
    assert names["task"] == "mixture"
    assert names["task.second_options.depth"] == 2


def test_a_file_may_give_a_name_or_a_name_and_options(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, depth in (("task: dt", 4), ("task: {name: dt, depth: 3}", 3)):
        path.write_text(f"preset: paper\n{text}\n", encoding="utf-8")
        assert load_config(path)[0].task_options == {"depth": depth}
    assert load_config(path, {"task": {"depth": 1}})[0].task_options == {"depth": 1}
    assert load_config(path, {"task": {"name": "sparse_lr"}})[0].task_options == {"sparsity": 3}
    path.write_text(f"preset: tiny\ntask: {{name: '{PATH}', scale: 3}}\n", encoding="utf-8")
    assert load_config(path)[0].task_options["scale"] == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task: [dt]",
            r"task = \['dt'\]: a name is needed, or name and options, such as {name: dt",
        ),
        ("task: {name: 3}", "a name is needed, or name and options"),
        ("task: {name: dt, dept: 3}", "unknown option of task 'dt' 'dept'; did you mean 'depth'"),
        ("depth: 3", "setting depth is an option of task 'dt': give --task dt --task.depth on"),
        ("task: sparse_lr\nsparsity: 3", "in a file task: {name: sparse_lr, sparsity: ...}"),
        ("task: relu_2nn\nhidden: 3", "give --task relu_2nn --task.hidden"),
        ("task: noisy_lr\nnoise_std: 1", "give --task noisy_lr --task.noise-std"),
        ("task_options: {depth: 3}", "unknown setting 'task_options'"),
        ("task: module_of_none:Mine", "module_of_none, which is not imported"),
    ],
)
def test_a_bad_task_in_a_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"preset: tiny\n{text}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


# --- checkpoints ----------------------------------------------------------------------------------


def saved(settings):
    """A checkpoint, as far as settings are read from it."""
    return SimpleNamespace(path=Path("run"), config=settings)


def test_checkpoints_of_before_keep_their_meaning():
    options = {"sparsity": None, "noise_std": None, "depth": None, "hidden": None}
    base = {"task": "lr", "n_dims": 5, "n_points": 9, **options}
    for task, option in (("dt", "depth"), ("sparse_lr", "sparsity"), ("relu_2nn", "hidden")):
        config = saved_config(saved(base | {"task": task, option: 2}))
        assert (config.task, config.task_options) == (task, {option: 2})
    assert saved_config(saved(base)).task_options == {}
    assert saved_config(saved(base | {"task": "dt"})).task_options == {"depth": 4}
    with pytest.raises(CheckpointError, match="unknown option of task 'dt' 'sparsity'"):
        saved_config(saved(base | {"task": "dt", "sparsity": 2}))


@pytest.mark.parametrize("name", pretrained.names())
def test_shipped_weights_keep_their_task(name):
    path = pretrained.path(name)
    config = pretrained.train_config(name)
    settings = json.loads((path / checkpoint.INDEX).read_text(encoding="utf-8"))["config"]
    given = {n: settings[n] for n in ("sparsity", "noise_std", "depth") if settings.get(n)}
    assert given.items() <= config.task_options.items()
    assert str(config.make_task()) in (path / "README.md").read_text(encoding="utf-8")
    assert saved_model_config(checkpoint.load(path)) == config.model_config()


def test_a_checkpoint_of_a_task_that_is_not_imported_is_refused_and_its_model_is_not():
    settings = {**TrainConfig(n_embd=64).to_dict(), "task": {"name": "module_of_none:Mine", "a": 1}}
    with pytest.raises(
        ValueError, match=r"checkpoint.json: task 'module_of_none:Mine' .* not impo"
    ):
        saved_config(saved(settings))
    with pytest.raises(ValueError, match="not imported") as caught:
        saved_config(saved(settings))
    assert isinstance(caught.value.__cause__, TaskNotImportedError)
    assert "corrupt" not in str(caught.value)
    assert saved_model_config(saved(settings)) == TrainConfig(n_embd=64).model_config()
    assert "module_of_none" not in sys.modules


@pytest.mark.parametrize("task", [None, 3, ["dt"], {"name": None}, {"name": "dt", "depth": "x"}])
def test_a_damaged_task_of_a_checkpoint_is_named(task):
    with pytest.raises(CheckpointError, match=r"checkpoint.json holds settings that can't be used"):
        saved_config(saved({**TrainConfig().to_dict(), "task": task}))


# --- flags and presets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("--task dt --task.depth 3 --lr 1", {"depth": "3"}),
        ("--task.depth=3", {"depth": "3"}),
        ("--task.noise-std -1", {"noise_std": "-1"}),
        ("--task.noise_std 1", {"noise_std": "1"}),
        ("--task.second-options.depth 2 --task.second dt", {"second_options": {"depth": "2"},
                                                            "second": "dt"}),
        ("--task.halve --lr 1", {}),
        ("--task.halve", {}),
        ("--lr 1 -- --task.depth 3", {}),
    ],
)  # fmt: skip
def test_options_of_a_task_are_read_before_other_flags(line, texts):
    assert task_texts(line.split()) == texts


def test_an_option_given_as_value_and_as_options_is_refused():
    with pytest.raises(ValueError, match="second is given as a single value, too"):
        task_texts(["--task.second", "dt", "--task.second.depth", "3"])


def test_a_task_without_a_preset_takes_that_of_lr():
    config = preset_config("tiny", PATH, task_options={"scale": 2})
    like = dataclasses.replace(config, task="lr")
    assert like == preset_config("tiny", "lr")
    assert (entry(PATH), entry("dt")) == ("lr", "dt")
    with pytest.raises(ValueError, match=r"^task .* needs a value of its option scale"):
        preset_config("tiny", PATH)
    assert preset_config("tiny", "dt", task_options={"depth": 3}).task_options == {"depth": 3}
