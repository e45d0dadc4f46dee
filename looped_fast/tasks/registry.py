"""Tasks by name: short names of the package's own, and paths such as ``mypackage.module:MyTask``.

A name from a file must never make anyone run code. ``find_task`` therefore takes a path only from
a module that is imported already, unless the caller is inside ``allow_task_import``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from looped_fast.errors import unknown_name
from looped_fast.tasks.base import Task, check_fields
from looped_fast.tasks.options import complete_options, option_types
from looped_fast.tasks.puzzles import PUZZLES

TASKS: dict[str, type[Task]] = {}  # short name -> class

_T = TypeVar("_T", bound=type[Task])
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_may_import: ContextVar[bool] = ContextVar("may_import", default=False)


class TaskNotImportedError(ValueError):
    """A task is defined in a module that is not imported, and may not be."""


def register(name: str) -> Callable[[_T], _T]:
    """Give a task of this package its short name."""

    def add(task: _T) -> _T:
        TASKS[name] = task
        return task

    return add


@contextlib.contextmanager
def allow_task_import() -> Iterator[None]:
    """Let ``find_task`` import the modules that paths name, which runs their code.

    >>> with allow_task_import():
    ...     task = find_task("looped_fast.tasks:DecisionTree")
    """
    token = _may_import.set(True)
    try:
        yield
    finally:
        _may_import.reset(token)


def find_task(name: str) -> type[Task]:
    """Find a task's class by its short name or by its path, ``module:Class``.

    Raises:
        TaskNotImportedError: the module is not imported, and may not be.
        ValueError: an unknown name; a module that does not exist or fails on import; or an object
            that is missing there, is no ``Task``, or is an incomplete one.
    """
    if not isinstance(name, str):
        raise ValueError(f"task {name!r}: a name is needed, such as lr or mypackage.module:MyTask")
    if name in TASKS:
        return TASKS[name]
    if name in PUZZLES:
        raise ValueError(
            f"task {name!r} is one of puzzles, and models other than trm take functions: add "
            f"--model trm, or choose another task: {', '.join(TASKS)}"
        )
    if ":" not in name:
        module, _, last = name.rpartition(".")
        hint = f"; for a class in a module, write {module}:{last}" if module else ""
        unknown = unknown_name("task", name, TASKS)
        raise ValueError(f"{unknown}; or a path such as mypackage.module:MyTask{hint}")
    module_name, _, attribute = name.partition(":")
    if not _PATH.fullmatch(name) or module_name.endswith(".py"):
        raise ValueError(
            f"task {name!r} is no path: a module's name (not a file's), a colon and a class are "
            f"needed, such as mypackage.module:MyTask"
        )
    if _may_import.get() and module_name not in sys.modules:
        _import(module_name, name)
    elif module_name not in sys.modules:
        raise TaskNotImportedError(
            f"task {name!r} is defined in module {module_name}, which is not imported; a name in a "
            f"file imports no code by itself. If you trust that module, import {module_name} "
            f"first, or give --allow-task-import (in Python: with "
            f"looped_fast.tasks.allow_task_import())"
        )
    task = _look_up(module_name, attribute, name)
    _check_class(task, name)
    return task


def task_name(task: type[Task]) -> str:
    """The name that ``find_task`` takes: short for the package's own, else a path.

    Raises:
        ValueError: ``task`` is no task, or it is defined in a function, where no path leads.
    """
    for name, known in TASKS.items():
        if task is known:
            return name
    _check_class(task, getattr(task, "__qualname__", repr(task)))
    if "<locals>" in task.__qualname__:
        raise ValueError(
            f"task {task.__qualname__} is defined in a function, where a checkpoint can't find it; "
            f"define it at the top of a module"
        )
    return f"{task.__module__}:{task.__qualname__}"


def task_label(name: str) -> str:
    """The short form of a task's name, for folders and legends: the class of a path.

    >>> task_label("mypackage.module:MyTask"), task_label("dt")
    ('MyTask', 'dt')
    """
    return name.rpartition(":")[2].rpartition(".")[2]


def task_options(name: str) -> list[str]:
    """The options of a task: its settings besides ``n_dims``.

    Raises:
        ValueError: as in ``find_task``.
    """
    return [*option_types(find_task(name), name)]


def make_task(name: str, n_dims: int, **options: Any) -> Task:
    """Make a task by its name, such as ``make_task("dt", n_dims=20, depth=4)``.

    Raises:
        ValueError: as in ``find_task``; or an option that is unknown, missing, of a wrong type or
            out of range.
    """
    task = find_task(name)
    return task(n_dims=n_dims, **complete_options(task, name, options))


def _import(module: str, name: str) -> None:
    """Import a module, from the working directory too, as ``python -m`` does."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # -I, -P
        here = os.getcwd()
        if not {"", here} & set(sys.path):
            sys.path.insert(0, here)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _fails_on_import(module, name, error) from error  # it imports what is missing
        raise ValueError(
            f"task {name!r}: there is no module {error.name}; start from the folder that holds it, "
            f"install it, or correct the name"
        ) from error
    except (Exception, SystemExit) as error:
        raise _fails_on_import(module, name, error) from error


def _fails_on_import(module: str, name: str, error: BaseException) -> ValueError:
    return ValueError(
        f"task {name!r}: module {module} fails on import, {type(error).__name__}: {error}; "
        f"correct it (python -c 'import {module}' shows where)"
    )


def _look_up(module: str, attribute: str, name: str) -> Any:
    """Follow a dotted name by dictionaries alone: a module's ``__getattr__`` may import more."""
    found: Any = sys.modules[module]
    for part in attribute.split("."):
        scope = getattr(found, "__dict__", {})
        if part not in scope:
            classes = [n for n, v in scope.items() if isinstance(v, type) and issubclass(v, Task)]
            own = [n for n in classes if scope[n].__module__ == module]
            has = f"the tasks there are {', '.join(own)}" if own else "it defines no task"
            hint = (
                "; a task defined in a script is found by that script alone: move it to a module"
                if module == "__main__"
                else ""
            )
            raise ValueError(f"task {name!r}: module {module} has no {attribute}; {has}{hint}")
        found = scope[part]
    return found


def _check_class(task: Any, name: str) -> None:
    if not (isinstance(task, type) and issubclass(task, Task)):
        what = f"class {task.__name__}" if isinstance(task, type) else f"a {type(task).__name__}"
        raise ValueError(
            f"task {name!r} is no Task but {what}; name a subclass of looped_fast.tasks.Task"
        )
    if task.__abstractmethods__:
        missing = ", ".join(sorted(task.__abstractmethods__))
        raise ValueError(f"task {name!r} is incomplete: define its {missing} (docs/tasks.md)")
    check_fields(task)
