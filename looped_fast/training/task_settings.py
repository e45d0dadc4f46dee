"""The task in settings: its name, or a dict of its name and options, ``{name: dt, depth: 4}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from looped_fast.tasks.options import merge_options

# Options of tasks that files of earlier versions hold among the other settings -> the task.
OPTIONS_OF_BEFORE = {
    "sparsity": "sparse_lr", "noise_std": "noisy_lr", "depth": "dt", "hidden": "relu_2nn",
}  # fmt: skip


def task_settings(task: Any) -> dict[str, Any]:
    """A task in settings as a dict of its name (which may be missing) and options.

    Raises:
        ValueError: it is neither a name, a class nor such a dict.
    """
    settings = dict(task) if isinstance(task, Mapping) else {"name": task}
    is_named = isinstance(settings.get("name", ""), str | type)
    if not (is_named and all(isinstance(name, str) for name in settings)):
        raise ValueError(
            f"setting task = {task!r}: a name is needed, or name and options, such as "
            f"{{name: dt, depth: 4}}"
        )
    return settings


def merge_task(before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Change ``task_settings``: options stay if the task does."""
    if changes.get("name", before.get("name")) != before.get("name"):
        return changes
    return merge_options(before, changes)


def with_options_of_before(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version, with the task's options where they are now."""
    found = {name: value for name, value in settings.items() if name not in OPTIONS_OF_BEFORE}
    given = {name: settings[name] for name in OPTIONS_OF_BEFORE if settings.get(name) is not None}
    if given:
        found["task"] = {**task_settings(settings.get("task", {})), **given}
    return found


def moved_option(name: str, given_as: str) -> ValueError:
    """Make the error for one of ``OPTIONS_OF_BEFORE`` among the other settings."""
    task = OPTIONS_OF_BEFORE[name]
    return ValueError(
        f"{given_as} is an option of task {task!r}: give --task {task} "
        f"--task.{name.replace('_', '-')} on the command line, and in a file task: "
        f"{{name: {task}, {name}: ...}}"
    )


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Plain dicts in place of ``TaskOptions``, which YAML can't write."""
    return {name: plain(v) if isinstance(v, Mapping) else v for name, v in options.items()}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``, the names of flags; a task's name is ``task``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        label = "task" if prefix + name == "task.name" else prefix + name
        found |= flat(value, f"{label}.") if isinstance(value, Mapping) else {label: value}
    return found
