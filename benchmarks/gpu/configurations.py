"""Tile configurations to time, and how to make the kernels run with given ones."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from looped_fast.kernels import tuning
from looped_fast.kernels.candidates import Config, architecture, candidates

# To time besides kernels/candidates.json, in case a prediction is wrong; 64 rows or more use wgmma
# on sm_90.
EXTRA = {
    "row_forward_kernel": (
        (32, 32, 32, 4, 2), (32, 64, 64, 4, 2), (32, 64, 64, 8, 2), (16, 64, 64, 4, 2),
        (64, 32, 32, 4, 2), (64, 64, 64, 4, 2), (64, 32, 32, 8, 2), (64, 64, 64, 8, 2),
        (128, 32, 32, 8, 2), (128, 64, 64, 8, 2),
    ),
    "row_backward_kernel": (
        (32, 64, 64, 8, 2), (16, 64, 64, 4, 2), (32, 32, 32, 4, 2), (64, 64, 64, 8, 2),
        (64, 32, 64, 8, 2), (64, 32, 32, 8, 2),
    ),
    "attention_forward_kernel": (
        (32, 0, 32, 2, 2), (64, 0, 32, 4, 2), (32, 0, 32, 4, 2), (64, 0, 64, 4, 2),
        (128, 0, 64, 4, 2),
    ),
    "attention_backward_kernel": (
        (32, 0, 32, 2, 2), (64, 0, 32, 4, 2), (32, 0, 32, 4, 2), (64, 0, 64, 4, 2),
    ),
}  # fmt: skip
KERNELS = tuple(EXTRA)


def configurations(kernel: str, arch: str, width: int, precision: str) -> tuple[Config, ...]:
    """Candidates of a kernel (arguments as in ``candidates``), then those of ``EXTRA``."""
    found = candidates(kernel, arch, width, precision)
    return tuple(dict.fromkeys((*found, *(Config(*values) for values in EXTRA[kernel]))))


@contextlib.contextmanager
def forced(configs: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Run kernels in the block with ``configs``, by name of the kernel, or first candidates."""

    def choose(kernel: Any, *, width: int, precision: str, device: Any, **_: object) -> Config:
        if kernel.__name__ in configs:
            return Config(*configs[kernel.__name__])
        arch = architecture(device)
        return candidates(kernel.__name__, arch, width, precision)[0]

    from looped_fast.kernels import backward, forward  # noqa: F401  # load all that choose

    modules = [
        module for name, module in sys.modules.items()
        if name.startswith("looped_fast.kernels")
        and getattr(module, "choose", None) is tuning.choose
    ]  # fmt: skip
    with contextlib.ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, "choose", choose))
        yield
