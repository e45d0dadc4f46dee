"""Presets: settings in three sizes for every task and model, as YAML files in this folder.

``paper`` is the official configuration (``configs/**``, ``exec/script_loop.sh``), ``small`` fits
a laptop, ``tiny`` takes minutes on two cores. ``python -m looped_fast.presets`` prints them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from looped_fast.errors import check_name, naming, unknown_name
from looped_fast.tasks import TASKS
from looped_fast.training.command_line import Parser, program
from looped_fast.training.config import MODELS, TrainConfig, config_from_dict
from looped_fast.training.yaml_file import read_yaml

Settings = dict[str, Any]

NAMES = ("paper", "small", "tiny")


@functools.cache
def _read(name: str) -> dict[str, Any]:
    """Read the file of a preset.

    ``all`` holds settings for all tasks, ``task`` those for each task, ``looped`` those for each
    task's looped model, and ``others`` for its standard and tied models, of ``depth`` layers.
    """
    return read_yaml(_file(name))


def _file(name: str) -> Path:
    return Path(__file__).parent / f"{name}.yaml"


def preset_config(preset: str, task: str = "lr", model: str = "looped") -> TrainConfig:
    """The settings of ``preset`` for that task and model.

    Raises:
        ValueError: a preset, task or model is unknown; the message has the nearest valid name.
    """
    for kind, name, valid in (
        ("preset", preset, NAMES),
        ("task", task, TASKS),
        ("model", model, MODELS),
    ):
        check_name(kind, name, valid)
    size = _read(preset)
    settings: Settings = {"task": task, "model": model, "preset": preset}
    for layer in (size["all"], _of(size["task"], task), _model_settings(size, task, model)):
        settings = _merge(settings, layer)
    with naming(_file(preset)):
        return config_from_dict(settings, TrainConfig())


def _model_settings(size: dict[str, Any], task: str, model: str) -> Settings:
    no_growth = {"start": None, "inc": 1, "interval": 1}
    if model == "looped":
        looped = _of(size["looped"], task)
        # The loop count starts at the window, as in the official scripts.
        return _merge({"curriculum": {"loops": {"start": looped["window"]}}}, looped)
    once = {"curriculum": {"loops": no_growth}, "injection": "none", **_of(size["others"], task)}
    if model == "standard":
        return {**once, "n_layer": size["depth"], "n_loops": 1, "window": 1}
    return {**once, "n_loops": size["depth"], "window": size["depth"]}


def _of(settings: dict[str, Settings], task: str) -> Settings:
    """The settings of a task; one without an entry of its own takes those of ``lr``."""
    return settings.get(task, settings["lr"])


def _merge(base: Settings, changes: Settings) -> Settings:
    merged = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if nested else value
    return merged


def describe(config: TrainConfig) -> str:
    """Write ``config`` as YAML, without settings that are None."""

    def without_none(settings: Settings) -> Settings:
        cleaned = {k: without_none(v) if isinstance(v, dict) else v for k, v in settings.items()}
        return {k: v for k, v in cleaned.items() if v is not None and v != {}}

    return yaml.safe_dump(without_none(config.to_dict()), sort_keys=False)


def main(args: list[str] | None = None) -> int:
    """Print presets: all, or those named, for every task of the looped model."""
    parser = Parser(program("presets"), description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="preset", help=", ".join(NAMES))
    names = parser.parse_args(args).names
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(str(unknown_name("preset", unknown[0], NAMES)))
    for preset in names or NAMES:
        for task in TASKS:
            print(f"# --preset {preset} --task {task}\n{describe(preset_config(preset, task))}")
    return 0
