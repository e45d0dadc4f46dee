"""Ready settings, as data: three sizes of every task and model.

``paper`` is the official configuration (``configs/**``, ``exec/script_loop.sh``), ``small`` fits
a laptop, ``tiny`` ends in minutes on two cores. ``python -m looped_fast.presets`` prints them.
"""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from looped_fast.errors import unknown_name
from looped_fast.tasks import TASKS
from looped_fast.training.config import MODELS, TrainConfig, config_from_dict

Settings = dict[str, Any]

_SHORT_PROMPTS = {"n_points": 41, "curriculum": {"points": {"start": 11, "inc": 2}}}
_LONG_PROMPTS = {"n_points": 101, "curriculum": {"points": {"start": 26, "inc": 5}}}

# For each size: settings of all tasks; of one task; of one task's looped model; of its others
# (standard and tied), and their number of layers.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "all": {
            "n_dims": 20,
            "n_positions": 101,
            "n_embd": 256,
            "n_head": 8,
            "batch_size": 64,
            "lr": 1e-4,
            "steps": 500_000,
            "curriculum": {
                "dims": {"start": 5, "inc": 1, "interval": 5000},
                "points": {"interval": 5000},
                "loops": {"inc": 2, "interval": 500},
            },
        },
        "task": {
            "lr": _SHORT_PROMPTS,
            "noisy_lr": _SHORT_PROMPTS,
            "sparse_lr": _SHORT_PROMPTS,
            "dt": _LONG_PROMPTS,
            "relu_2nn": _LONG_PROMPTS,
        },
        "looped": {
            "lr": {"n_loops": 30, "window": 15},
            "noisy_lr": {"n_loops": 30, "window": 15},
            "sparse_lr": {"n_loops": 20, "window": 10},
            "dt": {"n_loops": 70, "window": 15},
            "relu_2nn": {"n_loops": 12, "window": 5},
        },
        "others": {task: {} for task in TASKS},
        "depth": 12,
    },
    # The shipped weights (looped_fast/pretrained) are of this one; docs/recipes.md says how its
    # values were found.
    "small": {
        "all": {
            "n_dims": 5,
            "n_points": 16,
            "n_positions": 41,
            "n_embd": 64,
            "n_head": 4,
            "batch_size": 32,
            "lr": 3e-3,
            "beta2": 0.98,
            "init_std": 0.1,
            "warmup_steps": 300,
            "lr_decay": "cosine",
            "clip_grad_norm": 1.0,
            "steps": 8000,
            "eval_every": 1000,
            "save_every": 500,
            "curriculum": {
                "dims": {"start": 2, "inc": 1, "interval": 300},
                "points": {"start": 8, "inc": 2, "interval": 300},
                "loops": {"inc": 1, "interval": 500},
            },
        },
        "task": {
            "lr": {"steps": 7000},
            "noisy_lr": {"steps": 7000},
            "sparse_lr": {"n_dims": 8, "sparsity": 2, "batch_size": 64, "steps": 24_000},
            "dt": {
                "n_dims": 4,
                "depth": 2,
                "n_points": 32,
                "batch_size": 64,
                "lr": 1e-3,
                "curriculum": {"points": {"start": 12, "inc": 4, "interval": 200}},
            },
            "relu_2nn": {"batch_size": 64, "steps": 24_000},
        },
        "looped": {
            **{task: {"n_loops": 12, "window": 6} for task in TASKS},
            "dt": {"n_loops": 8, "window": 4},
        },
        "others": {
            **{task: {"lr": 1e-3, "steps": 6000, "batch_size": 32} for task in TASKS},
            # as many steps as the looped ones, of three quarters of the operations
            "sparse_lr": {"lr": 5e-4, "steps": 24_000, "batch_size": 32},
            "relu_2nn": {"lr": 1e-3, "steps": 24_000, "batch_size": 32},
        },
        "depth": 12,
    },
    "tiny": {
        "all": {
            "n_dims": 5,
            "n_points": 16,
            "n_positions": 16,
            "n_embd": 64,
            "n_head": 4,
            "batch_size": 64,
            "lr": 3e-3,
            "beta2": 0.98,
            "init_std": 0.1,
            "warmup_steps": 300,
            "lr_decay": "cosine",
            "clip_grad_norm": 1.0,
            "steps": 8000,
            "log_every": 50,
            "eval_every": 1000,
            "save_every": 500,
            "curriculum": {"dims": {"start": 2, "inc": 1, "interval": 400}},
        },
        "task": {
            "lr": {},
            "noisy_lr": {},
            "sparse_lr": {},
            "dt": {
                "n_dims": 4,
                "depth": 2,
                "n_points": 32,
                "n_positions": 32,
                "lr": 1e-3,
                "steps": 6000,
            },
            "relu_2nn": {},
        },
        "looped": {
            **{task: {"n_loops": 12, "window": 6} for task in TASKS},
            "dt": {"n_loops": 8, "window": 4},
        },
        "others": {task: {"lr": 1e-3} for task in TASKS},
        "depth": 8,
    },
}


def preset_config(preset: str, task: str = "lr", model: str = "looped") -> TrainConfig:
    """The settings of ``preset`` for that task and model.

    Raises:
        ValueError: an unknown preset, task or model; the message holds the nearest valid name.
    """
    for kind, name, valid in (
        ("preset", preset, _PRESETS),
        ("task", task, TASKS),
        ("model", model, MODELS),
    ):
        if name not in valid:
            raise unknown_name(kind, name, valid)
    size = _PRESETS[preset]
    settings: Settings = {"task": task, "model": model, "preset": preset}
    for layer in (size["all"], size["task"][task], _model_settings(size, task, model)):
        settings = _merge(settings, layer)
    return config_from_dict(settings, TrainConfig())


def _model_settings(size: dict[str, Any], task: str, model: str) -> Settings:
    no_growth = {"start": None, "inc": 1, "interval": 1}
    if model == "looped":
        looped = size["looped"][task]
        # As the official scripts do: the loop count starts at the window.
        return _merge({"curriculum": {"loops": {"start": looped["window"]}}}, looped)
    once = {"curriculum": {"loops": no_growth}, "injection": "none", **size["others"][task]}
    if model == "standard":
        return {**once, "n_layer": size["depth"], "n_loops": 1, "window": 1}
    return {**once, "n_loops": size["depth"], "window": size["depth"]}


def _merge(base: Settings, changes: Settings) -> Settings:
    merged = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if nested else value
    return merged


def describe(config: TrainConfig) -> str:
    """The settings as YAML, without those that are not set."""

    def without_none(settings: Settings) -> Settings:
        cleaned = {k: without_none(v) if isinstance(v, dict) else v for k, v in settings.items()}
        return {k: v for k, v in cleaned.items() if v is not None and v != {}}

    return yaml.safe_dump(without_none(config.to_dict()), sort_keys=False)


def main(args: list[str] | None = None) -> None:
    """Print presets: all, or those named, for every task of the looped model."""
    parser = argparse.ArgumentParser("python -m looped_fast.presets", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="preset", help=", ".join(_PRESETS))
    names = parser.parse_args(args).names
    if unknown := [name for name in names if name not in _PRESETS]:
        parser.error(str(unknown_name("preset", unknown[0], _PRESETS)))
    for preset in names or list(_PRESETS):
        for task in TASKS:
            print(f"# --preset {preset} --task {task}\n{describe(preset_config(preset, task))}")
