"""One process at a time writes to a run's folder: it holds a lock on ``<run>/run.lock``.

The lock is the operating system's, so it ends with the process that holds it, even if that is
killed. Linux passes it on to an NFS server, where other machines meet it. The file says who holds
the lock, and is removed on release.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = "run.lock"
_BYTE = 1 << 30  # locked on Windows, where a locked byte can't be read: beyond what says who

logger = logging.getLogger(__name__)


class InUseError(RuntimeError):
    """Another process, or another thread of this one, writes to the run's folder."""


@contextlib.contextmanager
def hold(run_dir: str | Path) -> Iterator[None]:
    """Be the only one who writes to ``run_dir``, which is created if absent.

    The thread that holds the lock may enter again.

    Raises:
        InUseError: somebody else holds the lock; the message says who.
        OSError: the folder can't be written.
    """
    file = Path(run_dir).resolve() / LOCK_FILE
    holder = file, threading.get_ident()
    if holder in _held:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    _forget_in_forks()
    stream = _acquire(file)
    _held[holder] = stream
    try:
        yield
    finally:
        if _held.pop(holder, None):  # else this is a fork, whose parent holds the lock
            _release(file, stream)


_held: dict[tuple[Path, int], IO[bytes]] = {}  # by lock file and thread


def _acquire(file: Path) -> IO[bytes]:
    while True:
        stream = file.open("a+b", buffering=0)
        try:
            _lock(stream)
        except (BlockingIOError, PermissionError):
            stream.seek(0)
            who = stream.read(200).decode(errors="replace").strip() or "another process"
            stream.close()
            raise InUseError(
                f"{file.parent} is in use: {who} holds {file.name} there; wait until it ends, "
                f"stop it, or choose another folder with --out"
            ) from None
        except OSError as error:
            logger.warning(
                "%s: this file system has no locks (%s), so nothing keeps a second process from "
                "writing to the folder", file.parent, error.strerror,
            )  # fmt: skip
        if _is_at(file, stream):
            break
        stream.close()  # the last holder removed the file while it was being opened here
    with contextlib.suppress(OSError):  # a full disk takes the lock, though not the text
        stream.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
    return stream


def _lock(stream: IO[bytes]) -> None:
    """Lock an open file, or raise BlockingIOError (PermissionError) if it is locked."""
    if sys.platform == "win32":
        stream.seek(_BYTE)
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(file: Path, stream: IO[bytes]) -> None:
    """Remove the lock file, and close it."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":  # removes no open file: neither ours, nor the next holder's
            stream.seek(_BYTE)
            msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)  # closing may unlock it later
            stream.close()
            file.unlink()
        elif _is_at(file, stream):
            file.unlink()
    stream.close()


def _is_at(file: Path, stream: IO[bytes]) -> bool:
    if sys.platform == "win32":
        return True  # an open file can't be removed there
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


@functools.cache
def _forget_in_forks() -> None:
    """A fork inherits the open file, which would stay locked until the fork ends, too."""

    def forget() -> None:
        for stream in _held.values():
            stream.close()
        _held.clear()

    if sys.platform != "win32":
        os.register_at_fork(after_in_child=forget)
