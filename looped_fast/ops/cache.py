"""JSON files in the user's cache folder, for what is measured once on a machine."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def folder() -> Path:
    """The cache folder: ``looped_fast`` under ``$XDG_CACHE_HOME``, or under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "looped_fast")


def load(path: Path) -> dict[str, Any]:
    """The mapping in ``path``; empty if there is no file, or it can't be read (which is logged)."""
    try:
        kept = json.loads(path.read_text())
        if isinstance(kept, dict):
            return kept
        error: Exception = ValueError(f"it holds a {type(kept).__name__}, a mapping is needed")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as caught:
        error = caught
    logger.warning("can't read %s, measuring afresh: %s", path, error)
    return {}


def update(path: Path, entries: dict[str, Any]) -> str | None:
    """Add ``entries`` to the mapping in ``path``, which other processes never see half-written.

    Returns:
        Why the file could not be written, or None.
    """
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(load(path) | entries, indent=1, sort_keys=True))
        temporary.replace(path)
    except OSError as error:
        return f"{path} can't be written: {error.strerror}"
    return None
