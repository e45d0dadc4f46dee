"""The one place that launches a Triton kernel, and the ways to see launches without executing them.

``launch`` works on a GPU, while a CUDA graph is being captured (it neither allocates nor
synchronises), and in Triton's interpreter. ``intercepting`` passes the launches of a block of code
to a function instead: ``recording`` lists them (tests count them, ``benchmarks.compile_report``
compiles them for absent architectures), ``ahead`` compiles them, ``trial`` times them.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .candidates import Config


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


class Call(NamedTuple):
    """One launch with its arguments, as ``launch`` was given them."""

    kernel: Any  # the @triton.jit function
    grid: tuple[int, ...]
    args: tuple[Tensor | int | float | None, ...]
    config: Config
    constexprs: dict[str, Any]  # without tile sizes

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return next(arg.device for arg in self.args if isinstance(arg, Tensor))

    def execute(self) -> None:
        """Compile if necessary, and launch on the current stream of the arguments' device."""
        self._run(warmup=False)

    def compile(self) -> None:
        """Compile, unless compiled before, and do not launch. Not for interpreted kernels."""
        self._run(warmup=True)

    def _run(self, warmup: bool) -> None:
        settle_cache_key(self.kernel)
        device = self.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel.run(
                *self.args,
                grid=self.grid,
                warmup=warmup,
                **self.constexprs,
                **self.config.tiles(self.kernel.arg_names),
                num_warps=self.config.num_warps,
                num_stages=self.config.num_stages,
                enable_fp_fusion=True,  # its default differs between versions of Triton
            )


# What happens to a launch inside ``intercepting``; it is executed if the result is True.
Interceptor = Callable[[Call], bool]
_intercept: contextvars.ContextVar[Interceptor | None] = contextvars.ContextVar(
    "looped_fast_intercept", default=None
)


@contextlib.contextmanager
def intercepting(intercept: Interceptor) -> Iterator[None]:
    """Hand every launch inside the block to ``intercept``, and execute it if that returns True.

    In nested blocks, only the innermost ``intercept`` gets a launch.
    """
    token = _intercept.set(intercept)
    try:
        yield
    finally:
        _intercept.reset(token)


def is_intercepted() -> bool:
    """True inside ``intercepting``, where launches may not happen."""
    return _intercept.get() is not None


@contextlib.contextmanager
def recording(execute: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches inside the block, in order.

    Args:
        execute: False only records, so that host code runs where no kernel can; outputs stay as
            they were allocated.
    """
    launches: list[Launch] = []

    def record(call: Call) -> bool:
        launches.append(_describe(call))
        return execute

    with intercepting(record):
        yield launches


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Tensor | int | float | None,
    config: Config,
    **constexprs: Any,
) -> None:
    """Launch ``kernel`` on the current stream of the device of its first tensor.

    Args:
        kernel: a ``@triton.jit`` function, with a constexpr parameter in capitals for each tile
            size of ``config`` that it uses: ``ROWS``, ``HIDDEN_CHUNK``, ``COLUMNS``.
        grid: number of programs along one to three axes.
        args: the kernel's parameters that are not constexpr, in order; None for one that this
            launch does not use.
        config: tile sizes, warps and pipeline stages, see ``tuning.choose``.
        constexprs: all other constexpr parameters, by name.
    """
    call = Call(kernel, grid, args, config, constexprs)
    intercept = _intercept.get()
    if intercept is None or intercept(call):
        call.execute()


def settle_cache_key(kernel: Any) -> None:
    """Compute the cache keys of a kernel and of the functions it calls, called functions first.

    Triton keeps a key once it is computed. In Triton 3.6 the key of a kernel covers the global
    constants of a function that it calls only if that function's own key was computed before
    (``DependenciesFinder._update_hash`` merges ``used_global_vals`` before it asks for the
    ``cache_key`` that fills them in). So keys depended on which kernels a process had launched
    before, and lookups in a cache that another process had made missed silently. With the called
    functions first, the keys are the same in every order, and those of later versions.

    Every launch calls this first; so must code that reads ``kernel.cache_key`` or ``hash(kernel)``
    before any launch.
    """
    if getattr(kernel, "hash", True) is not None:  # known, or interpreted and without a key
        return
    for node in ast.walk(kernel.parse()):
        if isinstance(node, ast.Name):
            value = kernel.fn.__globals__.get(node.id)
            if hasattr(type(value), "cache_key"):  # asks the type: the property computes the key
                settle_cache_key(value)
    _ = kernel.cache_key


def _describe(call: Call) -> Launch:
    kernel = call.kernel
    constexprs = call.constexprs | call.config.tiles(kernel.arg_names)
    parameters = inspect.signature(kernel.fn).bind(*call.args, **constexprs).arguments
    constexprs |= {name: None for name in parameters if parameters[name] is None}
    options = getattr(kernel, "kwargs", None) or vars(kernel)  # compiled; interpreted
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
            # Storage is aligned; a fake tensor has no address to check.
            multiple_of_16 = value.storage_offset() * value.element_size() % 16 == 0
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
            multiple_of_16 = isinstance(value, int) and value % 16 == 0
        if multiple_of_16 and name not in general:
            aligned.add(name)
    return Launch(kernel, types, frozenset(aligned), constexprs, call.config, tuple(call.grid))


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


# Called for a pending choice: (kernel, function that runs all candidates, function that chooses).
Postpone = Callable[[Any, Callable[[], None], Callable[[], Config]], None]
_postpone: contextvars.ContextVar[Postpone | None] = contextvars.ContextVar(
    "looped_fast_postpone", default=None
)


@contextlib.contextmanager
def postponing(postpone: Postpone) -> Iterator[None]:
    """Pass pending choices in the block to ``postpone``; ``choose`` returns the first candidate."""
    token = _postpone.set(postpone)
    try:
        yield
    finally:
        _postpone.reset(token)


def postponed() -> Postpone | None:
    """The argument of ``postponing`` around the caller, or None."""
    return _postpone.get()
