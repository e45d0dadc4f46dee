"""A graph that records and replays on the CPU, as a CUDA graph does on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that a capture forbids: they read values on the host, copy values from it, or make a
# tensor whose shape depends on values.
FORBIDDEN = {"_local_scalar_dense", "is_nonzero", "equal", "lift_fresh", "nonzero", "masked_select",
             "unique_dim", "_unique2", "bincount", "repeat_interleave"}  # fmt: skip


class HostSync(RuntimeError):
    """The recorded work runs an operation that a CUDA graph can't hold."""


class Recorder(TorchDispatchMode):
    """Lists every operation below autograd, with the tensors that it works on."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in FORBIDDEN:
            raise HostSync(f"operation not permitted when stream is capturing: {name}")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise HostSync("operation not permitted when stream is capturing: boolean index")
        result = func(*args, **kwargs)
        self.tape.append((func, args, kwargs, tensors(result)))
        return result

    def shapes(self) -> list[tuple]:
        """(operation, shapes of its results) in order, which shows what is allocated and when."""
        return [(str(func), *(tuple(t.shape) for t in made)) for func, _, _, made in self.tape]

    def from_outside(self) -> list[Tensor]:
        """Tensors that the work reads but did not make: a graph depends on their addresses."""
        made = {id(t) for *_, results in self.tape for t in results}
        read = [t for _, args, kwargs, _ in self.tape for t in tensors((args, kwargs))]
        return list({id(t): t for t in read if id(t) not in made}.values())


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class FakeGraph:
    """Repeats the operations it recorded, on the tensors that it recorded them with.

    What Python computed while recording (a learning rate, a step) is thus frozen, as on a GPU. A
    real capture runs nothing; this one runs the work, and its first replay runs nothing instead.
    """

    n_bytes = 100

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.recorder = Recorder()
        self.is_done = False

    def warm_up(self, work: Callable) -> Any:
        self.calls.append("warm up")
        return work()

    def capture(self, work: Callable) -> Any:
        self.calls.append("capture")
        with self.recorder:
            result = work()
        self.is_done = True
        return result

    def replay(self) -> None:
        self.calls.append("replay")
        if not self.is_done:
            with torch.no_grad():
                self._repeat()
        self.is_done = False

    def _repeat(self) -> None:
        for func, args, kwargs, recorded in self.recorder.tape:
            memory = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            is_view = any(t.untyped_storage()._cdata in memory for t in recorded)
            if is_view and not func._schema.is_mutable:
                continue
            for old, new in zip(recorded, tensors(func(*args, **kwargs)), strict=True):
                if old is not new:
                    old.copy_(new)
