"""Records of one call of the loop: tensors, settings, and what a backend is selected by."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from looped_fast.config import ATTENTION, INJECTIONS, PRECISIONS, check_window
from looped_fast.errors import check_name
from looped_fast.ops.block import GPT2, Block


class SharedWeights(list[Tensor]):
    """The ``weights`` of several calls of the loop, between which they do not change.

    A backend may keep what it makes of them: the CPU engine packs their matrices once.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__(weights)
        self.kept: dict[Hashable, Any] = {}


class LoopTensors(NamedTuple):
    """Tensors of one call of the loop, as documented in ``ops.loop``."""

    embeddings: Tensor
    positions: Tensor | None
    state: Tensor | None
    weights: list[Tensor]
    read_out: list[Tensor]
    seen: Tensor | None = None


class LoopSettings(NamedTuple):
    """Settings of one call of the loop; the ops take them one by one, in this order.

    Attributes:
        n_heads: attention heads; D is a multiple of it.
        n_loops: loop steps b.
        window: last steps W that carry gradient and are returned.
        injection: ``add``, ``mul``, ``none`` or ``every_block``; see ``ModelConfig``.
        precision: operands of matrix products: ``fp32`` (as given), ``bf16`` or ``fp16``.
        recompute: save only states for the backward, which recomputes each step's activations
            from the state before it.
        backend: ``auto``, or one of ``config.BACKENDS`` to force it.
        attention: its implementation on the triton backend: ``auto``, or ``flash_attn``, ``sdpa``
            (PyTorch's flash attention) or ``triton`` (this project's kernel) to force one.
        block: settings of the blocks; GPT-2's by default.
    """

    n_heads: int
    n_loops: int
    window: int
    injection: str = "add"
    precision: str = "fp32"
    recompute: bool = False
    backend: str = "auto"
    attention: str = "auto"
    block: Block = GPT2

    def flat(self) -> tuple[Any, ...]:
        """The settings one by one, those of the block last, as an op takes them."""
        return *self[:-1], *self.block

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> LoopSettings:
        """The inverse of ``flat``."""
        n = len(cls._fields) - 1
        return cls._make((*flat[:n], Block(*flat[n:])))

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError for a setting out of range, or one that tensors of ``dtype`` rule out.

        The backend is checked where it is selected.
        """
        check_window(self.n_loops, self.window)
        check_name("injection", self.injection, INJECTIONS)
        check_name("precision", self.precision, PRECISIONS)
        check_name("attention", self.attention, ("auto", *ATTENTION))
        if self.block is not GPT2:
            self.block.check()
        if self.precision != "fp32" and dtype != torch.float32:
            raise ValueError(
                f"precision {self.precision!r} needs float32 tensors, not {dtype}; "
                f"use precision='fp32', which computes in the dtype of the tensors"
            )


# The settings one by one for the schema of an op, which can't take a record. Loop counts may be
# symbolic: torch.compile would make an op of its own for each value of an int.
_SYMBOLIC = {"n_loops": "SymInt", "window": "SymInt"}
_OF_BLOCK = {f"block_{name}": kind for name, kind in get_type_hints(Block).items()}
_KINDS = {
    name: "int?" if kind == int | None else kind.__name__
    for name, kind in (get_type_hints(LoopSettings) | _OF_BLOCK).items()
    if kind is not Block
}
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in (_KINDS | _SYMBOLIC).items())
# With those of GPT-2's block as defaults, for ops that people call themselves.
SCHEMA_GPT2 = re.sub(r" block_(\w+)", lambda m: f"{m[0]}={getattr(GPT2, m[1])!r}", SCHEMA)
N_FLAT = len(_KINDS)


class Call(NamedTuple):
    """What ``backends.select`` selects by, and the key that it remembers a selection under."""

    settings: LoopSettings
    device: torch.device
    dtype: torch.dtype  # of embeddings and weights
    batch: int  # B
    seq_len: int  # S, tokens
    n_embd: int  # D
    n_layer: int
    replayed: bool = False  # as a CUDA graph
    training: bool = False  # with gradients; set only where ``replayed``
    n_queries: int = 0  # last tokens, which share those before them

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.settings.n_heads


def predicting(n_tokens: int, seen: Tensor | None) -> slice:
    """The tokens of a sequence that predict: queries, or else the even ones, which are x."""
    return slice(0, None, 2) if seen is None else slice(n_tokens - len(seen), None)


UNSHARED = "it has no queries that share examples"  # a backend's reason not to run a call


_replayed: ContextVar[bool] = ContextVar("looped_fast_replayed", default=False)


@contextlib.contextmanager
def replaying(on: bool = True) -> Iterator[None]:
    """Mark calls inside as replayed by a CUDA graph, so that ``auto`` uses times of replays."""
    token = _replayed.set(on)
    try:
        yield
    finally:
        _replayed.reset(token)


def is_replayed() -> bool:
    """True inside ``replaying``."""
    return _replayed.get()
