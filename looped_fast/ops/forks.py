"""Forked processes, which PyTorch's threads do not survive."""

from __future__ import annotations

import os
import warnings

import torch

_was_forked = False


def _mark() -> None:
    global _was_forked
    _was_forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_mark)


def keep_to_one_thread() -> None:
    """In a forked process, set PyTorch to one thread and say so, the first time.

    The child has a copy of its parent's pool of threads, without the threads: an operation that
    shares its work with them would wait forever. A DataLoader's worker is on one thread already.
    """
    global _was_forked
    if not _was_forked:
        return
    _was_forked = False
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked, and PyTorch's threads stayed in its parent: it now computes "
            "on one thread (torch.set_num_threads(1)). Start it by 'spawn' or 'forkserver' to use "
            "more",
            stacklevel=3,
        )
