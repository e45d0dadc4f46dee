"""Forked processes, which PyTorch's threads do not survive.

The child has a copy of its parent's pool of threads, without the threads: an operation that shares
its work with them waits forever.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import torch

_was_forked = False  # since this module was imported
_is_settled = False
_FORKED_NO_EXEC = 0x40  # PF_FORKNOEXEC of Linux: forked by a parent that ran the same program
_PATIENCE = 5.0  # seconds to wait for threads to start, on a busy machine


def _mark() -> None:
    global _was_forked, _is_settled
    _was_forked, _is_settled = True, False


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_mark)


def keep_to_one_thread() -> None:
    """In a forked process whose threads are gone, set PyTorch to one and say so, the first time.

    A DataLoader's worker is on one thread already. A process that was forked before this module was
    imported may have threads, from a fork server for example; this is tried.
    """
    global _is_settled
    if _is_settled:
        return
    _is_settled = True
    if torch.get_num_threads() > 1 and (_was_forked or _lost_threads_before()):
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked, and PyTorch's threads stayed in its parent: it now computes "
            "on one thread (torch.set_num_threads(1)). Start it by 'spawn' or 'forkserver' to use "
            "more",
            stacklevel=3,
        )


def _lost_threads_before() -> bool:
    """True if this process was forked before the import, and an operation on threads would hang."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        if not int(fields[6]) & _FORKED_NO_EXEC or len(os.listdir("/proc/self/task")) > 1:
            return False  # it has not been forked, or may have started threads itself
    except OSError:  # no Linux
        return False
    trial = os.fork()
    if trial == 0:
        torch.ones(1 << 20).sum()  # large enough to be shared among threads
        os._exit(0)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if os.waitpid(trial, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(trial, signal.SIGKILL)
    os.waitpid(trial, 0)
    return True
