"""YAML files of settings: ours (the fields of ``TrainConfig``) and the official code's.

An official file (``configs/**``) runs unchanged, with the files that it inherits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from looped_fast.compat import FAMILIES, LOOP_FUNCS
from looped_fast.config import PRED_TYPES
from looped_fast.errors import check_name, naming, unknown_name
from looped_fast.tasks import OFFICIAL_TASK_NAMES, find_task
from looped_fast.training.config import (
    MODELS,
    CurriculumConfig,
    ScheduleConfig,
    TrainConfig,
    config_from_dict,
)
from looped_fast.training.presets import NAMES as PRESETS
from looped_fast.training.presets import preset_config
from looped_fast.training.task_settings import (
    OPTIONS_OF_BEFORE,
    merge_task,
    moved_option,
    task_settings,
)
from looped_fast.training.yaml_file import read_yaml

MOST_FILES = 100  # that a file inherits; the official ones inherit two

# Our command line sets where a run reports and writes, which does not affect its results.
NOT_TAKEN_OVER = (
    "wandb.project, name, notes and timestamp, out_dir, gpu.n_gpu, debug_mode, keep_every_steps, "
    "test_size, test_idx"
)


def load_config(
    path: str | Path, given: Mapping[str, Any] | None = None, by_default: str = "small"
) -> tuple[TrainConfig, str]:
    """Read a YAML file of settings, ours or an official one (with its ``inherit``).

    A file of ours overrides settings of the preset that it names, for its task and model; an
    official file is complete, and takes no preset.

    Args:
        path: the file.
        given: settings that override those of the file, ``preset``, ``task``, ``model``, ...
        by_default: the preset if none is named.

    Returns:
        The settings, and a phrase that says where they come from.

    Raises:
        ValueError: not YAML, an unknown setting, a wrong value, or a preset for an official file;
            the message names the file. Or ``given`` has an unknown name.
        FileNotFoundError: no such file.
    """
    path, given = Path(path), given or {}
    for kind, valid in (("preset", PRESETS), ("model", MODELS)):
        if kind in given:
            check_name(kind, given[kind], valid)
    changed_task = task_settings(given.get("task", {}))
    if "name" in changed_task:
        find_task(changed_task["name"])
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no configuration file {path}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: 'name: value' lines are needed")
    if {"inherit", "training"} & content.keys():
        if "preset" in given:
            raise ValueError(
                f"{path} is an official file, which is complete: preset {given['preset']!r} would "
                f"change nothing; leave it out"
            )
        official = load_official_config(path)
        with naming(path):
            config = config_from_dict(dict(given), _from_official(official, path))
        return config, f"official settings of {path} (not taken over: {NOT_TAKEN_OVER})"
    with naming(path):
        if moved := [name for name in OPTIONS_OF_BEFORE if name in content]:
            raise moved_option(moved[0], f"setting {moved[0]}")
        task = task_settings(content.pop("task", {}))
    task = merge_task(task, changed_task)
    content |= {name: value for name, value in given.items() if name != "task"}
    choices = {name: content.get(name) for name in ("preset", "model")}
    named = {name: value for name, value in choices.items() if isinstance(value, str)}
    if named.get("preset", "").endswith((".yaml", ".yml")):
        del named["preset"]  # only a label, of a run whose settings came from a file
    options = {name: value for name, value in task.items() if name != "name"}
    with naming(path):
        base = preset_config(
            **{"preset": by_default, **named}, task=task.get("name", "lr"),
            n_dims=content.get("n_dims"), task_options=options,
        )  # fmt: skip
        config = config_from_dict({"preset": str(path), **content}, base)
    return config, f"settings of {path}"


def _from_official(official: dict[str, Any], path: Path) -> TrainConfig:
    """Convert official settings (``scripts/schema.py``) of ``path`` to ours, with the same effect.

    Raises:
        ValueError: settings that we can't train with; the message does not name the file.
    """
    model, training = official["model"], official["training"]
    kind = {"gpt2_loop": "looped", "gpt2": "standard", "gpt2_tying": "tied"}[model["family"]]
    check_name("task_name", training["task_name"], OFFICIAL_TASK_NAMES)
    task = OFFICIAL_TASK_NAMES[training["task_name"]]
    if model["pred_type"] != "regression":
        raise ValueError(f"pred_type = {model['pred_type']!r}; training is regression only")
    if task == "relu_2nn" and training["sparsity"] < 100:
        raise ValueError(f"sparsity = {training['sparsity']}; only dense networks (100) train here")
    if training["resume_id"] is not None:
        raise ValueError(
            f"resume_id = {training['resume_id']!r}; leave it out, and give that run's "
            f"checkpoint instead: --init-from .../state.pt"
        )
    curriculum = training["curriculum"]
    # No end is set for schedules that end at the final value: --n-loops then changes both.
    schedules = {
        name: ScheduleConfig(schedule["start"], schedule["inc"], schedule["interval"])
        for name, schedule in curriculum.items()
    }
    if curriculum["dims"]["end"] != model["n_dims"]:
        schedules["dims"] = ScheduleConfig(**curriculum["dims"])
    if kind == "looped":
        injection = LOOP_FUNCS[model["loop_func"]]
        n_layer, n_loops = model["n_layer"], curriculum["loops"]["end"]
        window = min(training["n_loop_window"], n_loops)
    elif kind == "standard":
        injection = "every_block" if training["add_inputs_embeds"] else "none"
        n_layer, n_loops, window = model["n_layer"], 1, 1
        schedules["loops"] = ScheduleConfig()
    else:
        # The official n_layer of a tied model counts the uses of its shared block.
        injection, n_layer, n_loops, window = "none", 1, model["n_layer"], model["n_layer"]
        schedules["loops"] = ScheduleConfig()
    return TrainConfig(
        task=task,
        model=kind,  # type: ignore[arg-type]
        preset=str(path),
        n_dims=model["n_dims"],
        n_points=curriculum["points"]["end"],
        n_positions=model["n_positions"],
        n_embd=model["n_embd"],
        n_head=model["n_head"],
        n_layer=n_layer,
        injection=injection,  # type: ignore[arg-type]
        n_loops=n_loops,
        window=window,
        # The official default of sparsity, 100, is the hidden width and means a dense network.
        task_options={"sparsity": training["sparsity"]} if task == "sparse_lr" else {},
        train_prompts=training["train_size"] if training["use_fixed_dataset"] else None,
        curriculum=CurriculumConfig(**schedules),
        steps=training["train_steps"],
        batch_size=training["batch_size"],
        lr=training["learning_rate"],
        weight_decay=training["weight_decay"],
        seed=training["seed"],
        init_from=model["pretrained_path"],
        amp="fp16" if training["use_ctx"] else "off",
        device="auto" if official["gpu"]["cuda"] else "cpu",
        log_every=official["wandb"]["log_every_steps"],
        save_every=training["save_every_steps"],
    )


class _Key(NamedTuple):
    """One setting of the official schema; required without a default, unless nullable."""

    type: type
    default: Any = None
    nullable: bool = False
    allowed: tuple[str, ...] = ()


# Official scripts/schema.py, except that gpu.n_gpu is optional: no official file has it, since the
# official shell scripts give it on the command line.
_SCHEMA = {
    "out_dir": _Key(str),
    "debug_mode": _Key(bool, False),
    "gpu.cuda": _Key(bool, True),
    "gpu.n_gpu": _Key(int, 0),
    "model.family": _Key(str, allowed=FAMILIES),
    "model.n_positions": _Key(int),
    "model.n_dims": _Key(int),
    "model.n_embd": _Key(int),
    "model.n_layer": _Key(int),
    "model.n_head": _Key(int),
    "model.pred_type": _Key(str, "regression", allowed=PRED_TYPES),
    "model.pretrained_path": _Key(str, nullable=True),
    "model.loop_func": _Key(str, "z=f(x+z)", allowed=tuple(LOOP_FUNCS)),
    "training.seed": _Key(int, 42),
    "training.task_name": _Key(str),
    "training.use_fixed_dataset": _Key(bool, False),
    "training.train_size": _Key(int, 0),
    "training.test_size": _Key(int, 0),
    "training.use_ctx": _Key(bool, False),
    "training.batch_size": _Key(int, 64),
    "training.learning_rate": _Key(float, 3e-4),
    "training.weight_decay": _Key(float, 0.0),
    "training.train_steps": _Key(int, 1000),
    "training.save_every_steps": _Key(int, 1000),
    "training.keep_every_steps": _Key(int, -1),
    "training.resume_id": _Key(str, nullable=True),
    **{
        f"training.curriculum.{what}.{field}": _Key(int)
        for what in ("dims", "points", "loops")
        for field in ("start", "end", "inc", "interval")
    },
    "training.n_loop_window": _Key(int, 1),
    "training.sparsity": _Key(int, 100),
    "training.add_inputs_embeds": _Key(bool, False),
    "training.test_idx": _Key(int, -1),
    "wandb.project": _Key(str, "ICL-breakdown"),
    "wandb.notes": _Key(str, ""),
    "wandb.name": _Key(str, nullable=True),
    "wandb.log_every_steps": _Key(int, 10),
    "wandb.timestamp": _Key(str, nullable=True),
}
_TYPE_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def load_official_config(path: str | Path) -> dict[str, Any]:
    """Load an official YAML file with what it inherits, completed with the official defaults.

    Paths under ``inherit`` are relative to the file that names them. Later files override earlier
    ones, and the file itself overrides them all, setting by setting. As in the official code, null
    stands for the default.

    Returns:
        Nested plain dict with every section and setting of the official ``scripts/schema.py``.

    Raises:
        FileNotFoundError: no such file, or one that it inherits is missing (both are named).
        ValueError: not YAML, an inherit cycle, more than ``MOST_FILES`` files, an unknown setting
            (with the nearest valid one), a missing one, or a value of the wrong type. The message
            names file and setting.
    """
    path = Path(path)
    given = _read_config(path, (), {})
    nested: dict[str, Any] = {}
    for name, key in _SCHEMA.items():
        value = given.get(name)
        value = key.default if value is None else value
        if value is None and not key.nullable:
            raise ValueError(f"{path}: {name} is missing; give it there or in an inherited file")
        *sections, leaf = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[leaf] = value
    return nested


def _read_config(
    path: Path, chain: tuple[Path, ...], known: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    """Dotted name -> checked value of ``path`` and its parents.

    chain: what inherits it; known: what is read already, since a file may be inherited many times.
    """
    file = Path(os.path.abspath(path))
    if file in chain:
        cycle = " -> ".join(map(str, (*chain[chain.index(file) :], file)))
        raise ValueError(f"{file}: inherit goes round in a cycle: {cycle}")
    if file in known:
        return known[file]
    if len(chain) + len(known) > MOST_FILES:
        raise ValueError(
            f"{chain[0]} inherits more than {MOST_FILES} files, {file} among them; put settings "
            f"that belong together in one file"
        )
    try:
        content = read_yaml(file) or {}
    except FileNotFoundError:
        inherited = f", which {chain[-1]} inherits," if chain else ""
        raise FileNotFoundError(f"{file}{inherited} does not exist") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: sections with settings are needed, not {content!r}")
    parents = content.pop("inherit", None) or []
    parents = parents if isinstance(parents, list) else [parents]
    if not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"{file}: inherit = {parents!r}; names of YAML files are needed")
    settings: dict[str, Any] = {}
    for parent in parents:
        settings.update(_read_config(file.parent / parent, (*chain, file), known))
    settings.update(_flatten(file, content, ""))
    known[file] = settings
    return settings


def _flatten(file: Path, section: dict[str, Any], prefix: str) -> dict[str, Any]:
    settings = {}
    depth = prefix.count(".") + 1
    siblings = {".".join(n.split(".")[:depth]): None for n in _SCHEMA if n.startswith(prefix)}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if name in siblings and name not in _SCHEMA:
            if not isinstance(value, dict | None):
                raise ValueError(f"{file}: {name} = {value!r}; a section of settings is needed")
            settings.update(_flatten(file, value or {}, f"{name}."))
        elif name not in siblings:
            raise unknown_name(f"setting in {file}:", name, siblings)
        else:
            settings[name] = _check_value(file, name, value)
    return settings


def _check_value(file: Path, name: str, value: Any) -> Any:
    key = _SCHEMA[name]
    if value is None:
        return None
    if key.type is float and type(value) is int:
        return float(value)
    if type(value) is not key.type:
        # YAML 1.1 reads 1e-4, without a point, as text.
        hint = "; write 1.0e-4 for 1e-4" if key.type is float and isinstance(value, str) else ""
        raise ValueError(f"{file}: {name} = {value!r}; {_TYPE_NAMES[key.type]} is needed{hint}")
    if key.allowed and value not in key.allowed:
        raise unknown_name(f"{name} in {file}:", value, key.allowed)
    return value
