"""Parse command lines; a mistyped flag, or value of a choice, gets the nearest valid one."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from looped_fast.errors import check_name, nearest
from looped_fast.tasks import allow_task_import, find_task
from looped_fast.tasks.options import FlagText, option_types
from looped_fast.training.config import KNOWN_AS, TrainConfig
from looped_fast.training.task_settings import OPTIONS_OF_BEFORE, moved_option

T = TypeVar("T")
Flags = Mapping[str, Collection[str]]  # flag -> its choices, or none if it takes any value


def task_imports(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """``allow_task_import`` if ``--allow-task-import`` is given."""
    return allow_task_import() if allowed else contextlib.nullcontext()


def import_named_tasks(*names: str | None) -> None:
    """Import the modules of tasks that the command line names by a path: its user's own word."""
    with allow_task_import():
        for name in names:
            if name is not None and ":" in name:
                find_task(name)


def program(command: str) -> str:
    """Name a command as this process was started: ``looped-fast train``, or by its module."""
    if Path(sys.argv[0]).stem == "looped-fast":
        return f"looped-fast {command.replace('_', '-')}"
    return f"python -m looped_fast.{command}"


def parse(
    command: type[T],
    args: Sequence[str] | None,
    prog: str,
    default: T | None = None,
    known_as: Mapping[str, str] = KNOWN_AS,
) -> T:
    """Make a ``command``, a dataclass whose fields are the flags, from arguments.

    Args:
        command: the dataclass.
        args: the arguments; those of this process if None.
        prog: the program's name, for ``--help``.
        default: holds what is not given.
        known_as: names of settings that others use -> ours, for hints.

    Raises:
        ValueError: an unknown flag or choice; the message has the nearest.
        SystemExit: ``--help``, or anything else that can't be parsed; tyro has printed why.
    """
    _escape_what_cannot_be_printed()
    args = sys.argv[1:] if args is None else args
    check_flags(args, _flags(command), known_as)
    parsed: T = tyro.cli(command, args=args, default=default, prog=prog)  # type: ignore[assignment]
    return parsed


def _escape_what_cannot_be_printed() -> None:
    """Print a path's characters that standard output's encoding lacks as escapes, not an error.

    On Windows that is the code page, once output goes to a file or a pipe.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors of unknown flags and choices have the nearest, too."""

    def __init__(self, prog: str | None = None, **settings: Any) -> None:
        _escape_what_cannot_be_printed()
        super().__init__(prog, allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """As in ``ArgumentParser``, which parses with it; exits with status 2 as that does."""
        args = sys.argv[1:] if args is None else args
        actions = self._option_string_actions
        try:
            check_flags(args, {flag: [*map(str, actions[flag].choices or ())] for flag in actions})
        except ValueError as error:
            self.error(str(error))
        return super().parse_known_args(args, namespace)


def check_flags(args: Sequence[str], valid: Flags, known_as: Mapping[str, str] = KNOWN_AS) -> None:
    """Raise ValueError for an unknown flag, or for a value that is none of its flag's choices."""
    hints = {_flag(name): _flag(ours) for name, ours in known_as.items()}
    for given, following in itertools.pairwise([*args, "--"]):
        name, has_value, value = given.partition("=")
        flag = name if name in valid else name.replace("_", "-")
        if flag == "--":
            return  # what follows are no flags
        if not flag.startswith("--") or flag == "--help" or flag.startswith("--tyro-"):
            continue
        if flag not in valid:
            moved = flag.removeprefix("--").replace("-", "_")
            if moved in OPTIONS_OF_BEFORE and "--task" in valid:
                raise moved_option(moved, flag)
            close = nearest(flag, valid, {a: b for a, b in hints.items() if b in valid})
            hint = f"did you mean {close}? " if close else ""
            raise ValueError(f"unknown flag {name}; {hint}--help lists all flags")
        value = value if has_value else following
        if valid[flag] and not value.startswith("--"):  # else tyro says that a value is missing
            check_name(f"value of {flag},", value, valid[flag])


def task_texts(args: Sequence[str]) -> dict[str, Any]:
    """Options of the task in arguments, ``--task.NAME VALUE``, as texts; dots make nested dicts.

    Settings must have them before ``parse`` can know which options there are. Switches without a
    value are left to it.
    """
    texts: dict[str, Any] = {}
    for given, following in itertools.pairwise([*args, "--"]):
        if given == "--":
            break
        flag, has_value, value = given.partition("=")
        if not flag.startswith("--task.") or (not has_value and following.startswith("--")):
            continue
        *parents, name = flag.removeprefix("--task.").replace("-", "_").split(".")
        options = texts
        for parent in parents:
            options = options.setdefault(parent, {})
            if not isinstance(options, dict):
                raise ValueError(f"{flag}: {parent} is given as a single value, too; give one")
        options[name] = FlagText(value if has_value else following)
    return texts


def option_flags(config: TrainConfig) -> Any:
    """A record of the options of ``config``'s task, from whose fields ``parse`` makes flags."""
    task = find_task(config.task)
    return _record(task.__doc__, config.task_options, option_types(task, config.task))


def _record(doc: str | None, values: Mapping[str, Any], hints: Mapping[str, Any]) -> Any:
    fields: list[tuple[str, Any]] = []
    held = dict(values)
    for name, value in values.items():
        kind = hints.get(name, str if isinstance(value, str) else type(value))
        if isinstance(value, Mapping) and value:
            held[name] = _record(None, value, {})
            kind = type(held[name])
        elif isinstance(value, Mapping):  # of a component without options
            kind = tyro.conf.Fixed[tyro.conf.Suppress[dict]]
        fields.append((name, kind))
    record = dataclasses.make_dataclass("Options", fields, frozen=True)
    record.__doc__ = doc or "Options of a component."
    return record(**held)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flags(record: type, prefix: str = "") -> dict[str, Collection[str]]:
    """The flags that tyro makes of a dataclass."""
    flags: dict[str, Collection[str]] = {}
    for name, hint in typing.get_type_hints(record, include_extras=True).items():
        markers: tuple[Any, ...] = getattr(hint, "__metadata__", ())
        kind = typing.get_args(hint)[0] if markers else hint
        if tyro.conf.Fixed in markers:
            continue
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            named = [m.name for m in markers if getattr(m, "name", None) is not None]
            label = named[0] if named else name
            flags |= _flags(kind, f"{prefix}{label}." if label else prefix)
        elif tyro.conf.Positional not in markers:
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            flags[_flag(prefix + name)] = choices
            if kind is bool:
                flags[_flag(f"{prefix}no_{name}")] = ()
    return flags
