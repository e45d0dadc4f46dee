"""Compile the kernels that a run needs before the first of them is launched, all at once.

Triton compiles a kernel at its first launch, on one core: 60 to 100 seconds of a training run's
first step. Here the host code runs once without launching anything, and what it would launch is
compiled by as many threads as there are cores. Triton releases Python's lock in its passes, in LLVM
and in ptxas, which are most of the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton

from .launch import Call, intercepting, is_intercepted, postponing

logger = logging.getLogger(__name__)

_done: set[Hashable] = set()


def compile_ahead(key: Hashable, device: torch.device, host_code: Callable[[], Any]) -> None:
    """Compile what ``host_code`` launches, and choose configurations, before it runs.

    The host code runs once or twice with its launches left out, the second time when there are
    configurations to choose: then their candidates are compiled and timed in between. Nothing
    happens at later calls with the key, off a GPU, while a CUDA graph is being captured, and where
    launches are intercepted. A kernel that can't be compiled is left to its launch, which raises
    the error.

    Args:
        key: equal keys promise host code that launches the same kernels.
        device: where the tensors of the host code are.
        host_code: allocates and launches, and may be repeated: it changes only its own tensors.
    """
    key = (key, device, torch.are_deterministic_algorithms_enabled())  # it bars timing
    if key in _done or is_intercepted() or not _can_compile(device):
        return
    try:
        if choices := _compile(host_code):
            for choose in choices:
                choose()
            _compile(host_code)
    except torch.OutOfMemoryError:
        logger.info("no memory to compile kernels ahead; each is compiled when first launched")
    _done.add(key)


def _can_compile(device: torch.device) -> bool:
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def _compile(host_code: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Compile what ``host_code`` launches, or all candidates of a kernel without a choice yet.

    Returns:
        Functions that make those choices.
    """
    open_choices: dict[str, Callable[[], Any]] = {}

    def compile_chosen(call: Call) -> bool:
        if call.kernel.__name__ not in open_choices:
            call.compile()
        return False

    def compile_candidate(call: Call) -> bool:
        call.compile()
        return False

    def postpone(kernel: Any, run_all: Callable[[], None], choose: Callable[[], Any]) -> None:
        if kernel.__name__ not in open_choices:
            open_choices[kernel.__name__] = choose
            with intercepting(compile_candidate):
                run_all()

    with compiling_together(), intercepting(compile_chosen), postponing(postpone):
        host_code()
    return list(open_choices.values())


@contextlib.contextmanager
def compiling_together() -> Iterator[None]:
    """Compile by threads what calls ``Call.compile`` in the block, until it ends; ignore errors."""
    n_threads, start = _n_cores(), time.perf_counter()
    with _Threads(n_threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
        yield
        if n_kernels := len(mode.raw_futures):
            logger.info("compiling %d kernels on %d cores", n_kernels, n_threads)
    if n_kernels:
        logger.info("compiled them in %.1f s", time.perf_counter() - start)


def _n_cores() -> int:
    """Cores that this process may run on; neither Windows nor macOS says which."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Threads(ThreadPoolExecutor):
    """Threads that compile kernels, each with its launcher."""

    def submit(self, compile_kernel: Callable[[], Any], /, *args: Any, **kwargs: Any) -> Future:
        return super().submit(_with_launcher, compile_kernel)


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    # Triton 3.6 has gcc compile a function in C for each signature, about 0.4 s, at first launch.
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel
