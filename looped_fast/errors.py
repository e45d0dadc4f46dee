"""Errors that name the value, the limit and the remedy, and files read with such errors."""

from __future__ import annotations

import contextlib
import difflib
import json
import stat
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MIB = 2**20
MOST_WEIGHTS = 2**36  # bytes of a file of weights


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, read or used; the message names file, fault and remedy."""


def nearest(name: object, valid: Iterable[str], known_as: Mapping[str, str] = {}) -> str | None:
    """The valid name that is spelt most like ``name``, if any is.

    known_as: names that others use -> the valid one that they stand for.

    >>> nearest("learning_rates", ["lr", "dt"], {"learning_rate": "lr"})
    'lr'
    """
    close = difflib.get_close_matches(str(name), [*valid, *known_as], n=1, cutoff=0.5)
    return known_as.get(close[0], close[0]) if close else None


def unknown_name(
    kind: str, name: object, valid: Iterable[str], known_as: Mapping[str, str] = {}
) -> ValueError:
    """Make a ValueError for a name outside ``valid`` that suggests the nearest valid one.

    >>> raise unknown_name("task", "lrr", ["lr", "dt"])
    Traceback (most recent call last):
    ...
    ValueError: unknown task 'lrr'; did you mean 'lr'? Valid: lr, dt
    """
    choices = list(valid)
    close = nearest(name, choices, known_as)
    hint = f"; did you mean {close!r}?" if close else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Valid: {', '.join(choices)}")


def check_name(kind: str, name: object, valid: Collection[str]) -> None:
    """Raise ``unknown_name`` unless ``name`` is one of ``valid``."""
    if name not in valid:
        raise unknown_name(kind, name, valid)


# Extra -> its packages, as in pyproject.toml. Messages name them, not ``looped_fast[extra]``, which
# pip would look up by a name that is not registered where the package runs from its source tree.
EXTRAS = {
    "eval": ("scikit-learn", "pandas", "xgboost" if sys.platform == "darwin" else "xgboost-cpu"),
    "hub": ("huggingface_hub",),
    "report": ("matplotlib", "tensorboard"),
    "triton": ("triton",),
    "wandb": ("wandb",),
}


def pip_install(extra: str) -> str:
    """The command that installs the packages of an extra."""
    return f"pip install {' '.join(EXTRAS[extra])}"


def needs_extra(what: str, package: str, extra: str) -> RuntimeError:
    """Make the error where a package of an extra is missing.

    >>> raise needs_extra("greedy trees need", "scikit-learn", "eval")
    Traceback (most recent call last):
    ...
    RuntimeError: greedy trees need scikit-learn, which is not installed: pip install ...
    """
    return RuntimeError(f"{what} {package}, which is not installed: {pip_install(extra)}")


@contextlib.contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Start the message of a ValueError with the file whose content is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_file(path: str | Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes. A FIFO or /dev/zero would never end.

    Raises:
        OSError: the file is missing or can't be read.
        ValueError: it is not a regular file, or larger than ``limit``; the message names it.
    """
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a FIFO, socket or device"
        raise ValueError(f"{path} is {what}; a regular file is needed")
    if status.st_size > limit:
        raise ValueError(
            f"{path} has {status.st_size} bytes, and at most {limit} are read; name another file"
        )
    return path.read_bytes()


def read_json(path: str | Path, limit: int = 64 * MIB) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most ``limit`` bytes.

    Raises:
        OSError: the file is missing or can't be read.
        ValueError: as in ``read_file``, or it holds no JSON object; the message names it.
    """
    content = read_file(path, limit)
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}; an object is needed")
    return found


# User errors: bad settings, unreadable files, divergence. Anything else is a bug, with a traceback.
EXPECTED = (ValueError, OSError, RuntimeError)


def report(error: BaseException) -> int:
    """Print an error; return the exit status: 2 if other arguments would help, else 1."""
    if not isinstance(error, EXPECTED):
        traceback.print_exception(error)
        return 1
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
