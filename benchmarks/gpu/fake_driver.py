"""A driver that claims to be a GPU, so that Triton compiles for one that is not there."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Launched(BaseException):
    """A kernel is compiled and about to be launched: the message is its name.

    Not an Exception: a part that lives on after one would go on.
    """


class FakeDriver(DriverBase):
    """Tensors are on the CPU; a launch raises ``Launched``.

    Args:
        capability: 90 for sm_90.
    """

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.launcher_cls = _refuse
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
        )

    @classmethod
    def is_active(cls) -> bool:
        """Not found by Triton's own search: ``pretend`` sets it."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """No launcher is generated."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_device_interface(self) -> None:
        """No module like torch.cuda."""

    def get_benchmarker(self) -> NoReturn:
        """Nothing can be timed."""
        raise NotImplementedError("nothing runs here")


def _refuse(source: Any, metadata: Any) -> NoReturn:
    raise Launched(metadata.name)


def pretend(capability: int = 90) -> None:
    """Have Triton compile for a GPU of ``capability`` in this process from here on."""
    triton.runtime.driver.set_active(FakeDriver(capability))


def settle_cache_key(kernel: Any) -> None:
    """Compute the cache keys of the functions that ``kernel`` calls, then its own.

    In Triton 3.6 the key of a kernel depends on which of them were computed before.
    """
    if kernel.hash is not None:
        return
    for node in ast.walk(kernel.parse()):
        called = kernel.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        if hasattr(type(called), "cache_key"):
            settle_cache_key(called)
    kernel.cache_key  # noqa: B018
