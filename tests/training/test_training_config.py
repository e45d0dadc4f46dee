from __future__ import annotations

import dataclasses
import re
import textwrap

import pytest
import yaml

from looped_fast.compat.config_files import load_config
from looped_fast.training.config import KNOWN_AS, ScheduleConfig, TrainConfig, config_from_dict
from looped_fast.training.presets import preset_config

OFFICIAL_BASE = """
    wandb: {project: Lets_Loop2, notes: , log_every_steps: 100}
    gpu: {cuda: True}
    model: {family: %s, n_embd: 256, n_layer: %d, n_head: 8, n_dims: 20, n_positions: 101}
    training:
        batch_size: 64
        task_name: linear_regression
        learning_rate: 0.0001
        weight_decay: 0.0
        train_steps: 500000
        save_every_steps: 1000
        keep_every_steps: 100000
        curriculum:
            dims: {start: 5, end: 20, inc: 1, interval: 5000}
            points: {start: 11, end: 41, inc: 2, interval: 5000}
            loops: {start: %d, end: %d, inc: 2, interval: 500}
        n_loop_window: %d
    out_dir: ./results2/linear_regression_loop
    debug_mode: False
"""
OFFICIAL_TASKS = {  # short name -> official name, extra settings, points, loops (T, b)
    "lr": ("linear_regression", "", (11, 41, 2), (15, 30)),
    "noisy_lr": ("noisy_linear_regression", "", (11, 41, 2), (15, 30)),
    "sparse_lr": ("sparse_linear_regression", "sparsity: 3", (11, 41, 2), (10, 20)),
    "dt": ("decision_tree", "", (26, 101, 5), (15, 70)),
    "relu_2nn": ("relu_2nn_regression", "", (26, 101, 5), (5, 12)),
}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def official_files(folder, task, family="gpt2_loop", n_layer=1):
    """Write files like the official configs/: a base file, and a task's that inherits it."""
    name, extra, (start, end, inc), (T, b) = OFFICIAL_TASKS[task]
    loops = (T, b, T) if family == "gpt2_loop" else (1, 1, 20)
    write(folder / "base_loop.yaml", OFFICIAL_BASE % (family, n_layer, *loops))
    return write(
        folder / task / "base_loop.yaml",
        f"""
        inherit:
            - ../base_loop.yaml

        training:
            task_name: {name}
            {extra}
            curriculum:
                points:
                    start: {start}
                    end: {end}
                    inc: {inc}
        out_dir: ./results2/{task}_loop
        """,
    )


def same_run(config):
    """The settings that a run's numbers depend on."""
    settings = config.to_dict()
    for name in ("preset", "curriculum", "eval_every"):
        del settings[name]
    return settings, config.make_curriculum(), config.make_task()


@pytest.mark.parametrize("task", list(OFFICIAL_TASKS))
@pytest.mark.parametrize(
    ("model", "family", "n_layer"),
    [("looped", "gpt2_loop", 1), ("standard", "gpt2", 12), ("tied", "gpt2_tying", 12)],
)
def test_an_official_file_is_the_papers_preset(tmp_path, task, model, family, n_layer):
    path = official_files(tmp_path, task, family, n_layer)
    config, origin = load_config(path)
    assert origin.startswith(f"official settings of {path}")
    assert same_run(config) == same_run(preset_config("paper", task, model))
    assert config.preset == str(path)


def official_with(tmp_path, changes):
    base = write(tmp_path / "base.yaml", OFFICIAL_BASE % ("gpt2_loop", 1, 20, 350, 20))
    content = yaml.safe_load(base.read_text())
    for dotted, value in changes.items():
        *sections, leaf = dotted.split(".")
        section = content
        for name in sections:
            section = section[name]
        section[leaf] = value
    return load_config(write(base, yaml.safe_dump(content)))[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"n_loops": 350, "window": 20, "seed": 42}),
        ({"model.loop_func": "z=f(x*z)"}, {"injection": "mul"}),
        ({"model.n_layer": 2}, {"n_layer": 2}),
        ({"training.use_ctx": True}, {"amp": "fp16"}),
        ({"training.seed": 7}, {"seed": 7}),
        ({"training.train_size": 640}, {"train_prompts": None}),
        (
            {"training.train_size": 640, "training.use_fixed_dataset": True},
            {"train_prompts": 640},
        ),
        ({"training.curriculum.loops.end": 8}, {"n_loops": 8, "window": 8}),
        (
            {"model.family": "gpt2", "training.add_inputs_embeds": True},
            {"injection": "every_block"},
        ),
    ],
)
def test_an_official_setting_becomes_ours(tmp_path, changes, expected):
    if "training.curriculum.loops.end" in changes:
        changes = {**changes, "training.curriculum.loops.start": 8}
    config = official_with(tmp_path, changes)
    assert {name: getattr(config, name) for name in expected} == expected


def test_an_unknown_official_task_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="task_name 'linear_regresion'; did you mean 'linear_reg"):
        official_with(tmp_path, {"training.task_name": "linear_regresion"})


def test_an_official_classification_is_refused(tmp_path):
    """The trainer has no classification task; it must not train a regression instead."""
    with pytest.raises(ValueError, match="classification"):
        official_with(tmp_path, {"model.pred_type": "classification"})


@pytest.mark.parametrize("preset", ["tiny", "paper"])
@pytest.mark.parametrize("model", ["looped", "standard", "tied"])
def test_settings_survive_yaml(tmp_path, preset, model):
    config = preset_config(preset, "sparse_lr", model)
    path = write(tmp_path / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert load_config(path) == (config, f"settings of {path}")
    assert config_from_dict(config.to_dict(), preset_config("small", "dt")) == config


def test_a_file_changes_only_what_it_says(tmp_path):
    path = write(tmp_path / "mine.yaml", "lr: 1e-3\nn_layer: 2\ncurriculum:\n  dims: {start: 3}\n")
    base = preset_config("tiny")
    config, _ = load_config(path, by_default="tiny")
    assert (config.lr, config.n_layer, config.preset) == (1e-3, 2, str(path))
    assert config.curriculum.dims == ScheduleConfig(start=3, inc=1, interval=400)
    assert config.batch_size == base.batch_size


def test_a_file_names_its_preset_task_and_model_and_the_command_line_goes_before_it(tmp_path):
    path = write(tmp_path / "mine.yaml", "preset: tiny\ntask: dt\nsteps: 9\n")
    expected = dataclasses.replace(preset_config("tiny", "dt"), steps=9)
    assert load_config(path)[0] == expected
    assert load_config(path, by_default="paper")[0] == expected
    standard = preset_config("small", "dt", "standard")
    given = {"preset": "small", "model": "standard"}
    assert load_config(path, given)[0] == dataclasses.replace(standard, steps=9)


def test_an_unknown_preset_in_a_file_is_named_with_the_nearest(tmp_path):
    path = write(tmp_path / "mine.yaml", "preset: tinny\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: unknown preset 'tinny'; did you mean"):
        load_config(path)


def test_an_official_run_to_resume_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"resume_id = 'abc'; .*--init-from"):
        official_with(tmp_path, {"training.resume_id": "abc"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown setting 'batchsize'; did you mean 'batch_size'"),
        ("curriculum: {dimms: {start: 3}}", "'curriculum.dimms'; did you mean 'curriculum.dims'"),
        ("steps: [1", "is not YAML"),
        ("- lr", "holds no settings: 'name: value' lines are needed"),
        ("", "holds no settings"),
        ("steps: many", "setting steps = 'many': int is needed"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*none\.yaml"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1.5}, "setting steps = 1.5: int is needed"),
        ({"steps": True}, "setting steps = True: int is needed"),
        ({"steps": None}, "setting steps = None: int is needed"),
        ({"lr": "fast"}, "setting lr = 'fast': float is needed"),
        ({"lr": True}, "setting lr = True: float is needed"),
        ({"out": 3}, "setting out = 3: str is needed"),
        ({"curriculum": 3}, "setting curriculum = 3: a mapping is needed"),
        ({"curriculum": {"dims": {"start": "a"}}}, "curriculum.dims.start = 'a': int is needed"),
        ({"amp": "bf61"}, "unknown value of setting amp, 'bf61'; did you mean 'bf16'"),
        ({"model": "loopd"}, "did you mean 'looped'"),
        ({"learning_rate": 1}, "unknown setting 'learning_rate'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_dict(settings, TrainConfig())


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"lr": "1e-4"}, "lr", 1e-4),  # YAML 1.1 reads it as text
        ({"lr": 1}, "lr", 1.0),
        ({"clip_grad_norm": None}, "clip_grad_norm", None),
        ({"amp": False}, "amp", "off"),  # YAML 1.1 reads a bare off as False
    ],
)
def test_a_value_that_yaml_reads_as_another_type_is_converted(settings, name, value):
    found = getattr(config_from_dict(settings, TrainConfig()), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "lrr"}, "unknown task 'lrr'; did you mean 'lr'"),
        ({"task": {"depth": 3}}, "task 'lr' has no option 'depth', nor any other"),
        ({"task": {"name": "dt", "sparsity": 3}}, "unknown option of task 'dt' 'sparsity'"),
        ({"task": {"name": "sparse_lr", "sparsity": 30}}, "sparsity = 30 exceeds n_dims = 20"),
        ({"n_points": 102}, "n_points = 102 exceeds n_positions = 101; lower n_points or raise"),
        ({"window": 31}, "window = 31 is outside 1..30"),
        ({"n_head": 7}, "n_embd = 256 is not divisible by n_head = 7"),
        ({"steps": 0}, "steps = 0: at least 1"),
        ({"batch_size": 0}, "batch_size = 0: at least 1"),
        ({"keep": 0}, "keep = 0: at least 1"),
        ({"eval_prompts": 0}, "eval_prompts = 0: at least 1"),
        ({"lr": -1.0}, "lr = -1.0: at least 0"),
        ({"lr": float("nan")}, "lr = nan: at least 0"),
        ({"warmup_steps": -1}, "warmup_steps = -1: at least 0"),
        ({"seed": -1}, "seed = -1: at least 0"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm = -1.0"),
        ({"model": "standard"}, "a standard model makes one pass, but n_loops = 30, window = 15"),
        ({"model": "tied"}, "a tied model is trained through all its steps, but window = 15"),
        ({"injection": "every_block"}, "injection = 'every_block' does not go with model = 'loop"),
        (
            {"model": "standard", "n_loops": 1, "window": 1},
            "injection = 'add' does not go with model = 'standard'; valid: none, every_block",
        ),
        (
            {"model": "tied", "n_loops": 12, "window": 12, "injection": "add"},
            "injection = 'add' does not go with model = 'tied'; valid: none",
        ),
        ({"backend": "tritn"}, "unknown backend 'tritn'; did you mean 'triton'"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_dict(settings, TrainConfig())


@pytest.mark.parametrize("name", ["dims", "points", "loops"])
def test_a_curriculum_that_ends_beyond_its_final_value_is_refused(name):
    with pytest.raises(ValueError, match=rf"curriculum\.{name}\.end = 999 exceeds its final value"):
        config_from_dict({"curriculum": {name: {"start": 1, "end": 999}}}, TrainConfig())


def test_a_schedule_without_a_start_is_at_its_end_at_once():
    assert ScheduleConfig().schedule(9).at(0) == 9
    assert ScheduleConfig(end=4).schedule(9).at(0) == 4


def test_a_schedule_starts_at_its_end_at_most():
    """This lets --n-loops 5 work with a preset whose loops start at 15."""
    assert ScheduleConfig(start=15).schedule(5).at(0) == 5


@pytest.mark.parametrize(("model", "count"), [("looped", 15), ("standard", 1), ("tied", 1)])
def test_the_loss_takes_the_window_of_looped_models_only(model, count):
    assert preset_config("paper", "lr", model).supervised_window == count


def test_a_switch_takes_true_or_false_alone():
    assert config_from_dict({"recompute": True}, TrainConfig()).recompute
    with pytest.raises(ValueError, match=r"recompute = 1: bool is needed"):
        config_from_dict({"recompute": 1}, TrainConfig())


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({}, 15),
        ({"n_loops": 10}, 10),
        ({"n_loops": 1}, 1),
        ({"n_loops": 40}, 15),
        ({"n_loops": 10, "window": 3}, 3),
        ({"n_loops": 12, "model": "tied", "injection": "none"}, 12),
        ({"n_loops": 40, "model": "tied", "injection": "none"}, 40),
        ({"n_loops": 1, "model": "standard", "injection": "none"}, 1),
    ],
)
def test_a_window_that_nobody_gave_fits_the_loop_count(given, window):
    assert TrainConfig(**given).window == window
    assert config_from_dict(given, TrainConfig(n_loops=30)).window == window


def test_a_window_that_was_given_is_not_lowered():
    for make in (
        lambda **given: TrainConfig(**given),
        lambda **g: config_from_dict(g, TrainConfig()),
    ):
        with pytest.raises(ValueError, match=r"window = 15 is outside 1\.\.10"):
            make(n_loops=10, window=15)


def test_the_loop_count_of_a_window_is_checked_first():
    with pytest.raises(ValueError, match=r"setting n_loops = '10': int is needed"):
        config_from_dict({"n_loops": "10"}, TrainConfig())
    with pytest.raises(ValueError, match=r"n_loops = 0"):
        TrainConfig(n_loops=0)


@pytest.mark.parametrize("name", ["steps", "seed", "n_embd", "batch_size", "warmup_steps"])
def test_a_number_beyond_64_bits_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} has 1994 bits; at most 63 are possible"):
        TrainConfig(**{name: 10**600})
    with pytest.raises(ValueError, match="depth has 1994 bits; at most 63 are possible"):
        TrainConfig(task="dt", task_options={"depth": 10**600})


@pytest.mark.parametrize(
    ("name", "ours"),
    [("learning_rate", "lr"), ("train_steps", "steps"), ("n_loop_window", "window"),
     ("precision", "amp"), ("max_grad_norm", "clip_grad_norm"), ("hidden_size", "n_embd")],
)  # fmt: skip
def test_a_name_of_others_gets_ours(name, ours):
    with pytest.raises(ValueError, match=f"unknown setting '{name}'; did you mean '{ours}'"):
        config_from_dict({name: 1}, TrainConfig())
    assert hasattr(TrainConfig(), ours)


def test_every_name_of_others_stands_for_a_setting():
    settings = {f.name for f in dataclasses.fields(TrainConfig)}
    assert set(KNOWN_AS.values()) <= settings
    assert settings.isdisjoint(KNOWN_AS)
