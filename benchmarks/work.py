"""Counts what kernels and PyTorch ops do, without a GPU: operations and bytes.

Kernels of ours are counted while Triton's interpreter runs them, so that masks, tails and skipped
tiles count for what they are; PyTorch's ops on fake tensors, from their shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from looped_fast.kernels.launch import Launch, recording

_SECTOR = 32  # bytes: what the memory of a GPU is read and written in


@dataclass
class Work:
    """Of one kernel."""

    name: str
    flops: float = 0.0  # of matrix products, 2 per multiplication and addition
    moved: float = 0.0  # bytes loaded and stored, as often as they are: by way of the L2 cache
    touched: float = 0.0  # bytes of distinct memory: the least that DRAM delivers and takes
    programs: int = 0  # thread blocks; 0 where unknown

    def times(self, factor: float) -> Work:
        """The work of so many kernels like this one in one launch."""
        return replace(
            self,
            flops=factor * self.flops,
            moved=factor * self.moved,
            touched=factor * self.touched,
        )


@dataclass
class _Counts:
    launches: list[Launch]
    works: list[Work] = field(default_factory=list)
    sectors: list[list[np.ndarray]] = field(default_factory=list)

    def current(self) -> Work:
        while len(self.works) < len(self.launches):
            launch = self.launches[len(self.works)]
            self.works.append(Work(launch.name, programs=int(np.prod(launch.grid))))
            self.sectors.append([])
        return self.works[-1]

    def access(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        work = self.current()
        addresses = np.broadcast_to(pointers, mask.shape)[mask]
        work.moved += addresses.size * size
        self.sectors[-1].append(np.unique(addresses // _SECTOR))

    def finish(self) -> None:
        self.current()
        for work, sectors in zip(self.works, self.sectors, strict=True):
            work.touched = np.unique(np.concatenate(sectors)).size * _SECTOR


@contextlib.contextmanager
def counting_kernels() -> Iterator[list[tuple[Launch, Work]]]:
    """Count each launch in the block, which the interpreter must run (``TRITON_INTERPRET=1``)."""
    from triton.runtime.interpreter import interpreter_builder as builder

    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store

    def counted_dot(a, b, *rest):
        counts.current().flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(a, b, *rest)

    def counted_load(pointers, mask, *rest):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        counts.access(pointers.data, mask.data, size)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        counts.access(pointers.data, mask.data, size)
        return store(pointers, value, mask, *rest)

    with (
        recording() as launches,
        mock.patch.object(builder, "create_dot", counted_dot),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
    ):
        counts = _Counts(launches)
        counted: list[tuple[Launch, Work]] = []
        yield counted
        counts.finish()
        counted += zip(launches, counts.works, strict=True)


class CountingOps(TorchDispatchMode):
    """Counts PyTorch's ops: one launch each, unless it only makes a view or a fresh tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and "empty" not in func.__name__:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self.works.append(Work(func.__name__, flops, size, size))
        return result
