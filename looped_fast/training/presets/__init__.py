"""Presets: settings in three sizes for every task and model, as YAML files in this folder.

(Those of the model trm are in ``trm.yaml``, which ``training.trm.config`` reads.)

``paper`` is the official configuration (``configs/**``, ``exec/script_loop.sh``), ``small`` fits
a laptop, ``tiny`` takes minutes on two cores. ``python -m looped_fast.presets`` prints them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from looped_fast.errors import check_name, naming, unknown_name
from looped_fast.tasks import TASKS, find_task, task_name
from looped_fast.tasks.puzzles import PUZZLES
from looped_fast.training.command_line import Parser, program
from looped_fast.training.config import MODELS, TrainConfig, config_from_dict
from looped_fast.training.task_settings import merge_task
from looped_fast.training.trm.config import PRESETS as TRM_PRESETS
from looped_fast.training.trm.config import trm_preset
from looped_fast.training.yaml_file import read_yaml, without_none

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


def preset_config(
    preset: str,
    task: str = "lr",
    model: str = "looped",
    *,
    n_dims: int | None = None,
    task_options: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The settings of ``preset`` for that task and model.

    Args:
        preset: one of ``NAMES``.
        task: a name that ``tasks.find_task`` takes. One without an entry in the preset takes the
            settings of ``entry(task)``.
        model: one of ``MODELS``.
        n_dims: width of x in place of the preset's, which options of the task must fit.
        task_options: options that replace those of the preset.

    Raises:
        ValueError: a preset, task or model is unknown; the message has the nearest valid name. Or
            the task can't be found, or an option of it is wrong or missing.
    """
    check_name("preset", preset, NAMES)
    name = task_name(find_task(task))
    check_name("model", model, MODELS)
    size = _read(preset)
    settings: Settings = {"model": model, "preset": preset}
    for layer in (size["all"], size["task"][entry(name)], _model_settings(size, name, model)):
        settings = _merge(settings, layer)
    if n_dims is not None:
        settings["n_dims"] = n_dims
    options = merge_task(settings.get("task", {}), dict(task_options or {}))
    settings["task"] = {**options, "name": name}
    is_preset = name in TASKS and not task_options  # else an error may be of these
    with naming(_file(preset)) if is_preset else contextlib.nullcontext():
        return config_from_dict(settings, TrainConfig())


def _model_settings(size: dict[str, Any], task: str, model: str) -> Settings:
    no_growth = {"start": None, "inc": 1, "interval": 1}
    if model == "looped":
        looped = size["looped"][entry(task)]
        # The loop count starts at the window, as in the official scripts.
        return _merge({"curriculum": {"loops": {"start": looped["window"]}}}, looped)
    once = {"curriculum": {"loops": no_growth}, "injection": "none", **size["others"][entry(task)]}
    if model == "standard":
        return {**once, "n_layer": size["depth"], "n_loops": 1, "window": 1}
    return {**once, "n_loops": size["depth"], "window": size["depth"]}


def entry(task: str) -> str:
    """The task whose settings a preset gives to ``task``: its own, or those of ``lr``."""
    return task if task in TASKS else "lr"


def _merge(base: Settings, changes: Settings) -> Settings:
    merged = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if nested else value
    return merged


def describe(config: TrainConfig) -> str:
    """Write ``config`` as YAML, without settings that are None."""
    return without_none(config.to_dict())


def main(args: list[str] | None = None) -> int:
    """Print presets: all, or those named, for every task of the looped model and of trm."""
    valid = (*NAMES, *sorted({*TRM_PRESETS} - {*NAMES}))
    parser = Parser(program("presets"), description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="preset", help=", ".join(valid))
    names = parser.parse_args(args).names
    if unknown := [name for name in names if name not in valid]:
        parser.error(str(unknown_name("preset", unknown[0], valid)))
    for preset in names or valid:
        for task in TASKS if preset in NAMES else ():
            print(f"# --preset {preset} --task {task}\n{describe(preset_config(preset, task))}")
        for task in PUZZLES if preset in TRM_PRESETS else ():
            settings = without_none(trm_preset(preset, task).to_dict())
            print(f"# --model trm --preset {preset} --task {task}\n{settings}")
    return 0
