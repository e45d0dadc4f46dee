"""Files and names that survive a power cut; files that are open elsewhere, on Windows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_PATIENCE = 5.0  # seconds to wait for whoever has a file open


def write_durably(file: Path, content: bytes) -> None:
    """Write a file that survives a power cut once its name is in place."""
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_names(folder: Path) -> None:
    """Make new names in the folder survive a power cut. Windows opens no folders, so it can't."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def when_free(change: Callable[..., object], *paths: Path) -> None:
    """Rename or remove: call ``change(*paths)``, as soon as nobody has the files open.

    Windows renames and removes no open file, nor a folder with one in it, and ``evaluate`` or a
    virus scanner opens each for a moment. Other systems don't mind.

    Raises:
        OSError: of ``change``; PermissionError, on Windows, only after some seconds of trying.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            change(*paths)
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
