"""YAML files of settings, ours and the official code's."""

import re
import time
from types import SimpleNamespace

import pytest
import yaml

from looped_fast import compat
from looped_fast.compat.config_files import load_config, load_official_config

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


def test_a_file_that_is_inherited_many_times_is_read_once(write):
    write("d0.yaml", "inherit: base.yaml\ntraining: {seed: 5}")
    for i in range(1, 25):
        write(f"d{i}.yaml", f"inherit: [d{i - 1}.yaml, d{i - 1}.yaml]")
    started = time.perf_counter()
    assert load_official_config(write("child.yaml", "inherit: d24.yaml"))["training"]["seed"] == 5
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("shape", ["chain", "list"])
def test_more_inherited_files_than_the_limit_are_refused_at_once(write, shape):
    if shape == "chain":
        for i in range(1500):
            write(f"d{i}.yaml", f"inherit: d{i + 1}.yaml")
        child = write("child.yaml", "inherit: d0.yaml")
    else:
        names = [f"d{i}.yaml" for i in range(300)]
        for name in names:
            write(name, "")
        child = write("child.yaml", f"inherit: [{', '.join(names)}]")
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"child\.yaml inherits more than 100 files") as caught:
        load_official_config(child)
    assert time.perf_counter() - started < 1
    assert len(str(caught.value)) < 2000


def test_a_hundred_inherited_files_are_read(write):
    names = [f"d{i}.yaml" for i in range(99)]
    for name in names:
        write(name, "")
    child = write("child.yaml", f"inherit: [{', '.join(names)}, base.yaml]")
    assert load_official_config(child)["model"]["n_embd"] == 256


@pytest.mark.parametrize("text", ["[" * 20_000, "null: 3", "training: {1: 2}", "seed: \xe9"])
def test_a_bad_file_is_named_where_it_is_inherited(write, tmp_path, text):
    (tmp_path / "parent.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"parent\.yaml is not"):
        load_official_config(write("child.yaml", "inherit: [base.yaml, parent.yaml]"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {n_head: 7}", "n_embd = 256 is not divisible by n_head = 7"),
        ("training: {task_name: linear_regresion}", "did you mean 'linear_regression'"),
        ("training: {learning_rate: .nan}", "lr = nan: at least 0"),
        ("training: {curriculum: {dims: {interval: 0}}}", "curriculum.dims: interval = 0"),
        ("training: {train_steps: 0}", "steps = 0: at least 1"),
        ("training: {resume_id: abc}", "resume_id = 'abc'; leave it out"),
        ("model: {pred_type: classification}", "training is regression only"),
    ],
)
def test_an_error_of_official_settings_starts_with_their_file(write, text, message):
    path = write("child.yaml", f"inherit: base.yaml\n{text}")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_given_beside_an_official_file_is_not_ignored(write):
    path = write("child.yaml", CHILD.replace("../", ""))
    config, _ = load_config(path, {"n_loops": 100})
    assert (config.n_loops, config.window) == (100, 20)
    assert load_config(write("base.yaml", BASE), {"task": "noisy_lr"})[0].task == "noisy_lr"
    with pytest.raises(ValueError, match=r"child\.yaml: unknown task 'lrr'; did you mean 'lr'"):
        load_config(path, {"task": "lrr"})
    with pytest.raises(ValueError, match=r"child\.yaml: a tied model is trained through all"):
        load_config(path, {"model": "tied"})
    with pytest.raises(ValueError, match=r"child\.yaml is an official file.*preset 'tiny' would"):
        load_config(path, {"preset": "tiny"})
