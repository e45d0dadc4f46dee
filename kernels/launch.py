"""The one place that launches a Triton kernel, and the record of what was launched.

``launch`` works on a GPU, while a CUDA graph is being captured (it neither allocates nor
synchronises), and in Triton's interpreter. ``recording`` collects the launches of a block of code:
tests count them, ``benchmarks.compile_report`` compiles them for architectures that are not there,
and ``benchmarks.roofline`` costs them.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looped_fast.kernels.tuning import Config


@dataclass(frozen=True)
class Launch:
    """One launch, in terms of what its machine code depends on."""

    kernel: Any  # the @triton.jit function
    types: dict[str, str]  # argument -> Triton's name of its type: "*bf16", "*fp32", "i32", "fp32"
    aligned: frozenset[str]  # arguments that are multiples of 16 (pointers: of 16 bytes)
    constexprs: dict[str, Any]  # with the tile sizes of ``config`` that the kernel declares
    config: Config
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.__name__


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}

# (launches so far, whether kernels run) of the innermost ``recording``.
_record: contextvars.ContextVar[tuple[list[Launch], bool] | None] = contextvars.ContextVar(
    "looped_fast_launches", default=None
)


@contextlib.contextmanager
def recording(execute: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches inside the block, in order.

    Args:
        execute: False records only, so that host code runs where no kernel can: outputs stay as
            they were allocated.
    """
    launches: list[Launch] = []
    token = _record.set((launches, execute))
    try:
        yield launches
    finally:
        _record.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Tensor | int | float | None,
    config: Config,
    **constexprs: Any,
) -> None:
    """Launch ``kernel`` on the current stream of the device of its first tensor.

    Args:
        kernel: a ``@triton.jit`` function; of the tile sizes of ``config`` it declares those it
            uses as constexpr parameters, in capitals: ``ROWS``, ``HIDDEN_CHUNK``, ``COLUMNS``.
        grid: number of programs along one to three axes.
        args: the kernel's parameters that are not constexpr, in order; None where this form of the
            kernel has no use for one.
        config: tile sizes, warps and pipeline stages, see ``tuning.choose``.
        constexprs: all other constexpr parameters, by name.
    """
    constexprs |= config.tiles(kernel.arg_names)
    record = _record.get()
    if record is not None:
        launches, execute = record
        launches.append(_describe(kernel, grid, args, config, constexprs))
        if not execute:
            return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](
            *args,
            **constexprs,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # its default differs between versions of Triton
        )


def _describe(kernel, grid, args, config, constexprs) -> Launch:
    parameters = inspect.signature(kernel.fn).bind(*args, **constexprs).arguments
    constexprs = constexprs | {name: None for name in parameters if parameters[name] is None}
    options = getattr(kernel, "kwargs", None) or vars(kernel)  # of @triton.jit; if interpreted
    general = {
        *(options.get("do_not_specialize") or ()),
        *(options.get("do_not_specialize_on_alignment") or ()),
    }
    types, aligned = {}, set()
    for name, value in parameters.items():
        if name in constexprs:
            continue
        if isinstance(value, Tensor):
            types[name] = "*" + _TYPES[value.dtype]
            # Storage starts aligned; and a fake tensor has no address.
            multiple_of_16 = value.storage_offset() * value.element_size() % 16 == 0
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
            multiple_of_16 = isinstance(value, int) and value % 16 == 0
        if multiple_of_16 and name not in general:
            aligned.add(name)
    return Launch(kernel, types, frozenset(aligned), constexprs, config, tuple(grid))
