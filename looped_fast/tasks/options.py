"""Values of settings, checked against the annotation of their dataclass field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from looped_fast.errors import check_name, unknown_name
from looped_fast.tasks.base import Task, option_fields


class TaskOptions(dict[str, Any]):
    """All options of one task, named ``task``: settings of another task drop them."""

    task: str = ""

    @classmethod
    def of(cls, name: str, task: Task) -> TaskOptions:
        """The options of ``task``, which settings know as ``name``."""
        options = cls(task.options)
        options.task = name
        return options

    @staticmethod
    def fitting(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """``options``; none if they are another task's than ``name``."""
        other = isinstance(options, TaskOptions) and options.task != name
        return {} if other else options


class FlagText(str):
    """The text of a flag on the command line, of whatever type its option is."""


def merge_options(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the options that ``changes`` names, and those of a component by name, too.

    A component's options replace those of another component: ``second_options`` of a mixture go
    with the task that ``second`` names.
    """
    merged = {**before, **changes}
    for name, value in changes.items():
        old = before.get(name)
        if isinstance(old, TaskOptions) and isinstance(value, Mapping):
            component = changes.get(name.removesuffix("_options"), old.task)
            if component == old.task:
                merged[name] = merge_options(old, value)
    return merged


def option_types(task: type[Task], label: str) -> dict[str, Any]:
    """Option -> its annotated type, of a task that messages call ``label``.

    Raises:
        ValueError: an annotation can't be resolved, or is no type that an option can have.
    """
    try:
        hints = typing.get_type_hints(task)
    except Exception as error:  # whatever an annotation written as text raises
        raise ValueError(
            f"task {label!r} has an annotation that can't be resolved ({error}); import what it "
            f"names where {task.__name__} is defined"
        ) from error
    found = {f.name: hints[f.name] for f in option_fields(task)}
    if "name" in found:
        raise ValueError(
            f"task {label!r} has an option called name, under which files keep the task's own "
            f"name; call it otherwise"
        )
    for name, hint in found.items():
        for kind in _members(hint):
            if _plain(kind) not in (int, float, bool, str, dict, Literal, types.NoneType):
                raise ValueError(
                    f"option {name} of task {label!r} is a {hint}; files and flags hold int, "
                    f"float, bool, str, Literal, dict[str, Any] and None alone"
                )
    return found


def complete_options(task: type[Task], label: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options as their annotated types, and the defaults of the others.

    Raises:
        ValueError: an option is unknown (the message has the nearest), of a wrong type, or is not
            given and has no default.
    """
    hints = option_types(task, label)
    for name in given:
        if not hints:
            raise ValueError(f"task {label!r} has no option {name!r}, nor any other")
        if name not in hints:
            raise unknown_name(f"option of task {label!r}", name, hints)
    values = {}
    for f in option_fields(task):
        if f.name in given:
            values[f.name] = coerce(f"task.{f.name}", given[f.name], hints[f.name])
        elif f.default is not dataclasses.MISSING:
            values[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            values[f.name] = f.default_factory()
        else:
            raise ValueError(
                f"task {label!r} needs a value of its option {f.name}, which has no default; give "
                f"--task.{f.name.replace('_', '-')}, or task_options={{{f.name!r}: ...}}"
            )
    return values


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Convert ``value`` to the annotated type: YAML reads 1e-4 as text, and 1 as an int.

    Raises:
        ValueError: it is of another type; the message names the setting.
    """
    members = _members(hint)
    if isinstance(value, FlagText):
        value = _read(value, [_plain(kind) for kind in members])
    if value is None and types.NoneType in members:
        return None
    kind = members[0]
    if typing.get_origin(kind) is Literal:
        # YAML reads a bare off as False, and on as True.
        if isinstance(value, bool):
            value = {False: "off", True: "on"}[value]
        check_name(f"value of setting {name},", value, typing.get_args(kind))
        return value
    plain = _plain(kind)
    if plain is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, plain) and isinstance(value, bool) == (plain is bool):
        return value
    raise ValueError(f"setting {name} = {value!r}: {plain.__name__} is needed")


def _read(text: str, kinds: list[Any]) -> Any:
    """What a flag's text stands for, or the text itself."""
    if types.NoneType in kinds and text == "None":
        return None
    if bool in kinds and text in ("True", "False"):
        return text == "True"
    if int in kinds and text.removeprefix("-").isdecimal():
        return int(text)
    return str(text)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _plain(kind: Any) -> Any:
    """``dict`` of ``dict[str, Any]``."""
    return typing.get_origin(kind) or kind
