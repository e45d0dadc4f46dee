from __future__ import annotations

import pytest
import torch
import yaml
from conftest import prompt

from looped_fast import LoopedTransformer
from looped_fast.tasks import OFFICIAL_TASK_NAMES, TASKS, sample_batch
from looped_fast.training import presets
from looped_fast.training.config import MODELS, TrainConfig, config_from_dict
from looped_fast.training.presets import describe, preset_config

SIZES = ("tiny", "small", "paper")

# Source: official configs/base.yaml and base_loop.yaml, and the files of tasks that inherit them.
OFFICIAL = {
    "n_dims": 20,
    "n_positions": 101,
    "n_embd": 256,
    "n_head": 8,
    "batch_size": 64,
    "lr": 0.0001,
    "weight_decay": 0.0,
    "steps": 500_000,
    "save_every": 1000,
    "log_every": 100,
}
POINTS = {  # configs/<task>/base_loop.yaml: start, end, inc
    "lr": (11, 41, 2),
    "noisy_lr": (11, 41, 2),
    "sparse_lr": (11, 41, 2),
    "dt": (26, 101, 5),
    "relu_2nn": (26, 101, 5),
}
LOOPS = {  # exec/script_loop.sh: b, T (it has no noisy task, whose configuration is that of lr)
    "lr": (30, 15),
    "noisy_lr": (30, 15),
    "sparse_lr": (20, 10),
    "dt": (70, 15),
    "relu_2nn": (12, 5),
}

EVERY = pytest.mark.parametrize(
    ("preset", "task", "model"),
    [(preset, task, model) for preset in SIZES for task in TASKS for model in MODELS],
)


@EVERY
def test_every_preset_builds_and_names_itself(preset, task, model):
    config = preset_config(preset, task, model)
    assert (config.preset, config.task, config.model) == (preset, task, model)
    stage = config.make_curriculum().at(config.steps)
    assert stage == (config.n_dims, config.n_points, config.n_loops)
    assert config.make_task().n_dims == config.n_dims
    with torch.device("meta"):
        LoopedTransformer(config.model_config())


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("model", MODELS)
def test_the_tiny_preset_predicts(task, model):
    config = preset_config("tiny", task, model)
    net = LoopedTransformer(config.model_config())
    xs, ys = sample_batch(config.make_task(), 2, config.n_points, seed=0, step=0)
    with torch.no_grad():
        predictions = net(xs, ys)
    assert predictions.shape == (config.window, 2, config.n_points)
    assert predictions.isfinite().all()


@pytest.mark.parametrize("task", OFFICIAL_TASK_NAMES.values())
@pytest.mark.parametrize("model", MODELS)
def test_the_paper_preset_has_the_official_values(task, model):
    config = preset_config("paper", task, model)
    assert {name: getattr(config, name) for name in OFFICIAL} == OFFICIAL
    assert (config.warmup_steps, config.lr_decay, config.clip_grad_norm) == (0, "none", None)
    assert (config.amp, config.seed, config.train_prompts) == ("off", 42, None)
    curriculum = config.make_curriculum()
    dims, points = curriculum.dims, curriculum.points
    assert (dims.start, dims.end, dims.inc, dims.interval) == (5, 20, 1, 5000)
    assert (points.start, points.end, points.inc, points.interval) == (*POINTS[task], 5000)


@pytest.mark.parametrize("task", OFFICIAL_TASK_NAMES.values())
def test_the_paper_preset_loops_as_the_official_script(task):
    config = preset_config("paper", task)
    b, T = LOOPS[task]
    loops = config.make_curriculum().loops
    assert (config.n_loops, config.window, config.n_layer, config.injection) == (b, T, 1, "add")
    assert (loops.start, loops.end, loops.inc, loops.interval) == (T, b, 2, 500)


def test_the_papers_standard_and_tied_models_have_depth_12():
    standard, tied = (preset_config("paper", "lr", model) for model in ("standard", "tied"))
    assert (standard.n_layer, standard.n_loops, standard.window) == (12, 1, 1)
    assert (tied.n_layer, tied.n_loops, tied.window) == (1, 12, 12)
    assert standard.injection == tied.injection == "none"


def test_task_options_of_the_paper_are_the_official_ones():
    tasks = {task: preset_config("paper", task).make_task() for task in TASKS}
    assert tasks["noisy_lr"].noise_std == 0.1
    assert tasks["sparse_lr"].sparsity == 3
    assert tasks["dt"].depth == 4
    assert tasks["relu_2nn"].hidden == 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("papr", "lr", "looped"), "unknown preset 'papr'; did you mean 'paper'"),
        (("tiny", "lrr", "looped"), "unknown task 'lrr'; did you mean 'lr'"),
        (("tiny", "lr", "loopd"), "unknown model 'loopd'; did you mean 'looped'"),
    ],
)
def test_an_unknown_name_is_named_with_the_nearest(args, message):
    with pytest.raises(ValueError, match=message):
        preset_config(*args)


@EVERY
def test_a_description_is_yaml_of_the_same_settings(preset, task, model):
    config = preset_config(preset, task, model)
    text = describe(config)
    assert "null" not in text
    assert config_from_dict(yaml.safe_load(text), TrainConfig()).to_dict() | {
        "curriculum": None
    } == config.to_dict() | {"curriculum": None}


@pytest.mark.parametrize(("names", "count"), [([], 3 * len(TASKS)), (["tiny"], len(TASKS))])
def test_presets_print_themselves(names, count, capsys):
    presets.main(names)
    printed = capsys.readouterr().out
    assert printed.count("# --preset") == count
    assert "# --preset tiny --task dt\n" in printed


def test_printing_an_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        presets.main(["smal"])
    assert stop.value.code == 2
    assert "did you mean 'small'" in capsys.readouterr().err


def test_a_preset_is_not_changed_by_its_use():
    before = preset_config("paper", "dt").to_dict()
    config = preset_config("paper", "dt")
    config_from_dict({"curriculum": {"dims": {"start": 1}}}, config)
    LoopedTransformer(preset_config("tiny").model_config())(*prompt(d=5))
    assert preset_config("paper", "dt").to_dict() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all: [", r"tiny\.yaml is not YAML"),
        (
            "{all: {steps: x}, task: {lr: {}}, looped: {lr: {window: 1}}}",
            r"tiny\.yaml: .*int is need",
        ),
    ],
)
def test_a_damaged_file_of_a_preset_is_named(tmp_path, monkeypatch, text, message):
    (tmp_path / "tiny.yaml").write_text(text)
    monkeypatch.setattr(presets, "_file", lambda name: tmp_path / f"{name}.yaml")
    monkeypatch.setattr(presets, "_read", presets._read.__wrapped__)  # without its cache
    with pytest.raises(ValueError, match=message):
        preset_config("tiny")
