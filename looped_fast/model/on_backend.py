"""What models have in common that run their loop as one op: which backend, and when not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from looped_fast.config import ATTENTION, BACKENDS, PRECISIONS
from looped_fast.errors import check_name
from looped_fast.ops import backends, reference
from looped_fast.ops.graphed_loop import GraphedLoop
from looped_fast.ops.modules import Reasons, Watch, constant_in_graphs, global_hooks


class OnBackend(nn.Module):
    """A model whose loop runs as one op, on a backend.

    Hooks, adapters and replaced modules inside are in force: while any differs from what the op
    computes, the model runs module by module in plain PyTorch, and says so once.

    Args:
        config: of the model, a ``kind``.
        kind: its class.
        backend, recompute, attention, cuda_graphs: as a model documents them.
        called: names of children that the model calls as modules on any backend.

    Raises:
        TypeError: ``config`` is no ``kind``, or ``recompute`` is no bool.
        ValueError: an unknown backend, attention or cuda_graphs.
    """

    def __init__(
        self,
        config: Any,
        kind: type,
        backend: str,
        recompute: bool,
        attention: str,
        cuda_graphs: str,
        called: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        for name, value, wanted in (("config", config, kind), ("recompute", recompute, bool)):
            if not isinstance(value, wanted):
                raise TypeError(f"{name} = {value!r}: a {wanted.__name__} is needed")
        check_name("backend", backend, ("auto", *BACKENDS))
        check_name("attention", attention, ("auto", *ATTENTION))
        self.config = config
        self.backend = backend
        self.recompute = recompute
        self.attention = attention
        self.precision: str | None = None  # set by ``accelerate``; None follows autocast
        self.graphed = GraphedLoop(cuda_graphs)
        self.watch = Watch(_deviations, of_model=False, called=called)

    def unfit(self) -> Iterable[str]:
        """Say of each module that the op stands in for why it would not compute the same."""
        raise NotImplementedError

    @constant_in_graphs
    def deviations(self) -> Reasons:
        """Say why the model runs module by module now; empty if ``ops.loop`` runs it.

        Raises:
            ValueError: it would, but ``backend`` forces another than ``reference``.
        """
        if reasons := self.watch(self):
            backends.select_modules(self.backend, reasons)
            message = f"{type(self).__name__} runs module by module in plain PyTorch"
            self.watch.say_once(message, reasons)
        return reasons


def _deviations(model: OnBackend) -> Reasons:
    return *global_hooks(), *model.unfit()


def ambient_precision(device_type: str) -> str:
    """The precision of the ambient ``torch.autocast``: bf16 or fp16; fp32 without one."""
    if not reference.is_autocast_enabled(device_type):
        return "fp32"
    dtype = torch.get_autocast_dtype(device_type)
    for name in PRECISIONS:
        if reference.AUTOCAST_DTYPES[name] == dtype:
            return name
    raise ValueError(f"autocast to {dtype} is not supported; use torch.bfloat16 or torch.float16")
