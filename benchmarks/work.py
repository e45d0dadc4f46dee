"""Count the work of PyTorch's ops, from the shapes of tensors, which may be fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from looped_fast.ops import flops

flops.register()  # PyTorch has no formula for its attention on CPUs


class Op(NamedTuple):
    """An op, or several in one kernel."""

    name: str
    flops: float  # of matrix products, 2 per multiplication and addition
    inner: int  # terms that they sum over; 0 without products
    reads: dict[int, int]  # memory -> bytes
    writes: dict[int, int]

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


class CountingOps(TorchDispatchMode):
    """Collects PyTorch's ops, except those that only make a view or an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._alive: list[Tensor] = []  # so that no memory is reused

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and "empty" not in func.__name__:
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            matrices = [t for t in args if isinstance(t, Tensor) and t.dim() >= 2]
            inner = matrices[0].shape[-1] if flops else 0
            reads, writes = self._memory((args, kwargs)), self._memory(result)
            self.ops.append(Op(func.__name__, flops, inner, reads, writes))
        return result

    def _memory(self, tree: object) -> dict[int, int]:
        tensors = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
        self._alive += tensors
        return {t.untyped_storage()._cdata: t.numel() * t.element_size() for t in tensors}


def is_product(op: Op) -> bool:
    """True if ``op`` multiplies matrices, attention included."""
    return op.flops > 0


def compiled(ops: Sequence[Op]) -> list[Op]:
    """The kernels of a compiled step: ops between two matrix products are one.

    It reads what earlier ops wrote, and writes what later ops read, or none: a result.
    """
    last_read = {memory: i for i, op in enumerate(ops) for memory in op.reads}
    kernels: list[Op] = []
    run: list[Op] = []
    for i, op in enumerate([*ops, None]):
        if op is not None and not is_product(op):
            run.append(op)
            continue
        if run:
            reads: dict[int, int] = {}
            writes: dict[int, int] = {}
            for part in run:
                reads |= {m: size for m, size in part.reads.items() if m not in writes}
                writes |= part.writes
            kept = {m: size for m, size in writes.items() if last_read.get(m, i) >= i}
            kernels.append(Op("fused", 0, 0, reads, kept))
            run = []
        if op is not None:
            kernels.append(op)
    return kernels
