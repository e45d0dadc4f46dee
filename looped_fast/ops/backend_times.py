"""Times of backends on this machine's GPUs: measured by training runs, remembered on disk.

Times hold for one kind of call: a GPU, versions of PyTorch and Triton, the model's sizes, a
precision, and the exact shape of the batch, since ``compiled`` compiles for each shape. They are
times of replayed CUDA graphs: without graphs, launching kernels costs time as well.
"""

from __future__ import annotations

import functools
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from looped_fast.config import BACKENDS
from looped_fast.kernels.candidates import operand_precision
from looped_fast.ops import cache
from looped_fast.ops.call import Call
from looped_fast.ops.reference import AUTOCAST_DTYPES

Times = dict[str, float]  # backend -> milliseconds


def path() -> Path:
    """The file that holds the times."""
    return cache.folder() / "backends.json"


def lookup(call: Call) -> Times:
    """Known times of calls like ``call``.

    Empty where none were measured, where the call is not replayed, and under
    ``torch.use_deterministic_algorithms(True)``: results must not depend on timing there.
    """
    if not call.replayed or torch.are_deterministic_algorithms_enabled():
        return {}
    return _known().get(_kind(call), {})


def remember(call: Call, times: Times) -> str | None:
    """Add ``times`` of calls like ``call``, in this process and on disk.

    Returns:
        Why the times could not be written to disk, or None.
    """
    kind = _kind(call)
    _known()[kind] = _known().get(kind, {}) | times
    return cache.update(path(), {kind: _known()[kind]})


def remember_failure(call: Call, backend: str, reason: str) -> None:
    """Note, for this process only, that ``backend`` failed when it was measured."""
    _failed.setdefault(_kind(call), {})[backend] = reason


def failures(call: Call) -> dict[str, str]:
    """Backends that failed when they were measured on calls like ``call``, and why."""
    return _failed.get(_kind(call), {}) if call.replayed else {}


_failed: dict[str, dict[str, str]] = {}


@functools.cache
def _known() -> dict[str, Times]:
    """Times by kind of call, read from disk once in a process."""
    return cache.load(path(), _are_times)


def _are_times(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        name in BACKENDS and type(time) in (int, float) and 0 < time < math.inf
        for name, time in entry.items()
    )


def operands(call: Call) -> str:
    """Operands of matrix products: ``fp32``, ``tf32``, ``bf16``, ``fp16``, or ``fp64``."""
    if call.dtype == torch.float64:
        return "fp64"
    return operand_precision(AUTOCAST_DTYPES[call.settings.precision] or torch.float32)


def _kind(call: Call) -> str:
    device = _device_name(call.device)
    what = "training step" if call.training else "inference"
    settings = call.settings
    return (
        f"{device}/torch {torch.__version__}/triton {_triton_version()}/{what}/{operands(call)}/"
        f"D {call.n_embd}/heads {settings.n_heads}/layers {call.n_layer}/{settings.injection}/"
        f"B {call.batch}/S {call.seq_len}"
    )


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"
