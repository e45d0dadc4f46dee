"""JSON files in the user's cache folder, for what is measured once on a machine."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from looped_fast.errors import read_json

logger = logging.getLogger(__name__)


def folder() -> Path:
    """The cache folder: ``looped_fast`` under ``$XDG_CACHE_HOME``, or under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "looped_fast")


def load(path: Path, is_valid: Callable[[Any], bool] = lambda entry: True) -> dict[str, Any]:
    """The mapping in ``path``, without entries that are not valid; empty if there is no file.

    A file that can't be read and entries that are left out are logged, once in a process.
    """
    try:
        kept = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"can't read {path}, measuring afresh: {error}")
        return {}
    for name, entry in kept.items():
        if not is_valid(entry):
            _warn_once(f"{path}: ignoring {name} = {reprlib.repr(entry)}, measuring afresh")
    return {name: entry for name, entry in kept.items() if is_valid(entry)}


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def update(path: Path, entries: dict[str, Any]) -> str | None:
    """Add ``entries`` to the mapping in ``path``, which other processes never see half-written.

    Returns:
        Why the file could not be written, or None.
    """
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(load(path) | entries, indent=1, sort_keys=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return f"{path} can't be written: {error.strerror}"
    return None
