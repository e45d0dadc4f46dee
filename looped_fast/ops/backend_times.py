"""Times of backends on this machine's GPUs: measured by training runs, remembered on disk.

Times hold for one kind of call: a GPU, versions of PyTorch and Triton, the model's sizes, a
precision, and the shape of the batch. The shape is exact, since ``compiled`` compiles for each.
They are times of replayed CUDA graphs; without graphs other things cost time.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from looped_fast.kernels.tuning import operand_precision
from looped_fast.ops import cache
from looped_fast.ops.reference import AUTOCAST_DTYPES

if TYPE_CHECKING:
    from looped_fast.ops.backends import Problem

Times = dict[str, float]  # backend -> milliseconds


def path() -> Path:
    """The file that remembers."""
    return cache.folder() / "backends.json"


def lookup(problem: Problem) -> Times:
    """Times of calls like ``problem``.

    Empty where none were measured, where the call is not replayed, and under
    ``torch.use_deterministic_algorithms(True)``: results must not depend on timing there.
    """
    if not problem.replayed or torch.are_deterministic_algorithms_enabled():
        return {}
    return _known().get(_kind(problem), {})


def remember(problem: Problem, times: Times) -> str | None:
    """Add ``times`` of calls like ``problem``, in this process and on disk.

    Returns:
        Why they are not on disk, or None.
    """
    kind = _kind(problem)
    _known()[kind] = _known().get(kind, {}) | times
    return cache.update(path(), {kind: _known()[kind]})


def remember_failure(problem: Problem, backend: str, reason: str) -> None:
    """Note in this process that ``backend`` failed when it was measured; the next tries again."""
    _failed.setdefault(_kind(problem), {})[backend] = reason


def failures(problem: Problem) -> dict[str, str]:
    """Backends that failed when they were measured on calls like ``problem``, and why."""
    return _failed.get(_kind(problem), {}) if problem.replayed else {}


_failed: dict[str, dict[str, str]] = {}


@functools.cache
def _known() -> dict[str, Times]:
    """Read once in a process, not at every call."""
    return {
        kind: times
        for kind, times in cache.load(path()).items()
        if isinstance(times, dict) and all(isinstance(t, int | float) for t in times.values())
    }


def operands(problem: Problem) -> str:
    """What matrix products multiply: ``fp32``, ``tf32``, ``bf16``, ``fp16``, or ``fp64``."""
    if problem.dtype == torch.float64:
        return "fp64"
    return operand_precision(AUTOCAST_DTYPES[problem.precision] or torch.float32)


def _kind(problem: Problem) -> str:
    device = _device_name(problem.device, problem.device_index)
    what = "training step" if problem.training else "inference"
    return (
        f"{device}/torch {torch.__version__}/triton {_triton_version()}/{what}/{operands(problem)}/"
        f"D {problem.n_embd}/heads {problem.n_heads}/layers {problem.n_layer}/{problem.injection}/"
        f"B {problem.batch}/S {problem.seq_len}"
    )


@functools.cache
def _device_name(device: str, index: int) -> str:
    return torch.cuda.get_device_name(index) if device == "cuda" else device


@functools.cache
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"
