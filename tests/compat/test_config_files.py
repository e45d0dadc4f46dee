"""YAML files of settings, ours and the official code's."""

from types import SimpleNamespace

import pytest
import yaml

from looped_fast import compat
from looped_fast.compat.config_files import load_official_config

BASE = """
wandb: {project: Lets_Loop2, notes: , log_every_steps: 100}
gpu: {cuda: True}
model: {family: gpt2_loop, n_embd: 256, n_layer: 1, n_head: 8, n_dims: 20, n_positions: 101}
training:
    batch_size: 64
    task_name: linear_regression
    learning_rate: 0.0001
    weight_decay: 0
    train_steps: 500000
    curriculum:
        dims: {start: 5, end: 20, inc: 1, interval: 5000}
        points: {start: 11, end: 41, inc: 2, interval: 5000}
        loops: {start: 20, end: 350, inc: 2, interval: 500}
    n_loop_window: 20
out_dir: ./results2/linear_regression_loop
"""  # as official configs/base_loop.yaml
CHILD = """
inherit: [../base.yaml]
training:
    task_name: sparse_linear_regression
    sparsity: 3
    curriculum: {points: {end: 101, inc: 5}}
"""  # as official configs/sparse_LR/base_loop.yaml


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    write("base.yaml", BASE)
    return write


def test_config_inherits_setting_by_setting_and_is_completed(write):
    config = load_official_config(write("sparse/child.yaml", CHILD))
    training = config["training"]
    assert training["task_name"] == "sparse_linear_regression"
    assert training["sparsity"] == 3
    assert training["curriculum"]["points"] == {"start": 11, "end": 101, "inc": 5, "interval": 5000}
    assert training["curriculum"]["dims"] == {"start": 5, "end": 20, "inc": 1, "interval": 5000}
    assert training["learning_rate"] == 1e-4
    assert type(training["weight_decay"]) is float  # given as 0
    assert training["seed"] == 42  # official default
    assert config["model"]["loop_func"] == "z=f(x+z)"
    assert config["model"]["pretrained_path"] is None
    assert config["wandb"] == {
        "project": "Lets_Loop2",
        "notes": "",  # null stands for the default
        "name": None,
        "log_every_steps": 100,
        "timestamp": None,
    }
    assert config["gpu"] == {"cuda": True, "n_gpu": 0}
    assert "inherit" not in config
    assert config["debug_mode"] is False


def test_later_parent_wins_and_null_restores_the_default(write):
    write("a.yaml", "training: {seed: 1, batch_size: 7}")
    write("b.yaml", "training: {seed: 2}\nwandb:")
    child = write("c.yaml", "inherit: [base.yaml, a.yaml, b.yaml]\ntraining: {batch_size: }")
    training = load_official_config(child)["training"]
    assert training["seed"] == 2
    assert training["batch_size"] == 64


def test_inherit_may_be_one_name_and_go_through_several_files(write):
    write("middle.yaml", "inherit: base.yaml\ntraining: {seed: 5}")
    config = load_official_config(write("child.yaml", "inherit: middle.yaml"))
    assert config["training"]["seed"] == 5
    assert config["model"]["n_embd"] == 256


def test_a_config_builds_its_model(write):
    config = load_official_config(write("sparse/child.yaml", CHILD))
    model = compat.build_model(SimpleNamespace(**config["model"]))
    assert sum(p.numel() for p in model.parameters()) == 847873


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainin: {seed: 1}", ["unknown setting", "child.yaml", "did you mean 'training'?"]),
        ("training: {sed: 1}", ["child.yaml", "did you mean 'training.seed'?"]),
        ("training: {seed: x}", ["child.yaml", "training.seed = 'x'", "a whole number"]),
        ("training: {seed: true}", ["training.seed = True", "a whole number"]),
        ("training: {learning_rate: 1e-4}", ["training.learning_rate = '1e-4'", "1.0e-4"]),
        ("training: 3", ["child.yaml", "training = 3", "section"]),
        ("model: {n_embd: {a: 1}}", ["model.n_embd = {'a': 1}", "a whole number"]),
        ("model: {family: gpt3}", ["model.family", "child.yaml", "did you mean 'gpt2'?"]),
        ("out_dir: ", ["child.yaml", "out_dir is missing"]),
        ("inherit: child.yaml", ["inherit goes round in a cycle", "child.yaml -> "]),
        ("inherit: 3", ["child.yaml: inherit = [3]", "YAML files"]),
        ("- 1", ["child.yaml", "sections with settings"]),
        ("a: [1", ["child.yaml is not YAML", "line"]),
    ],
)
def test_a_bad_config_is_named_with_file_and_setting(write, text, parts):
    text = text if text.startswith(("-", "a:", "inherit")) else f"inherit: base.yaml\n{text}"
    with pytest.raises(ValueError, match="yaml") as caught:
        load_official_config(write("child.yaml", text))
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_section_is_named(write):
    content = yaml.safe_load(BASE)
    del content["training"]["curriculum"]
    with pytest.raises(ValueError, match=r"training\.curriculum\.dims\.start is missing"):
        load_official_config(write("child.yaml", yaml.safe_dump(content)))


def test_a_missing_file_is_named_with_the_one_that_inherits_it(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        load_official_config(tmp_path / "nowhere.yaml")
    child = write("child.yaml", "inherit: [gone.yaml]")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml, which .*child\.yaml inherits"):
        load_official_config(child)
