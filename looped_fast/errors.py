"""Errors that name the value, the limit and the remedy."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Collection, Iterable


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, read or used; the message names file, fault and remedy."""


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """Make a ValueError for a name outside ``valid`` that suggests the nearest valid one.

    >>> raise unknown_name("task", "lrr", ["lr", "dt"])
    Traceback (most recent call last):
    ...
    ValueError: unknown task 'lrr'; did you mean 'lr'? Valid: lr, dt
    """
    choices = list(valid)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Valid: {', '.join(choices)}")


def check_name(kind: str, name: object, valid: Collection[str]) -> None:
    """Raise ``unknown_name`` unless ``name`` is one of ``valid``."""
    if name not in valid:
        raise unknown_name(kind, name, valid)


# User errors: bad settings, unreadable files, divergence. Anything else is a bug, with a traceback.
EXPECTED = (ValueError, OSError, RuntimeError)


def report(error: BaseException) -> int:
    """Print an error; return the exit status: 2 if other arguments would help, else 1."""
    if not isinstance(error, EXPECTED):
        traceback.print_exception(error)
        return 1
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
