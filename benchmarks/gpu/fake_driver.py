"""A driver that claims to be a GPU, so that Triton compiles without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Launched(BaseException):
    """A kernel is about to be launched: the message is its name.

    Not an Exception, which parts catch in order to continue.
    """


class FakeDriver(DriverBase):
    """A driver for ``target``, with tensors on the CPU; a launch raises ``Launched``."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.launcher_cls = _refuse
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
        )

    @classmethod
    def is_active(cls) -> bool:
        """Keep it out of Triton's search: ``pretend`` sets it."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return ``ty``: no launcher is generated."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """Target of compilation."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Device of tensors."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """Index of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Default stream."""
        return 0

    def get_device_interface(self) -> None:
        """None: there is no module like torch.cuda."""

    def get_benchmarker(self) -> NoReturn:
        """Raise, as nothing can be timed."""
        raise NotImplementedError("nothing runs here")


def _refuse(source: Any, metadata: Any) -> NoReturn:
    raise Launched(metadata.name)


def target_of(arch: str) -> GPUTarget:
    """Triton's name of an architecture: ``"sm_90"``, ``"gfx942"``."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def pretend(arch: str = "sm_90") -> None:
    """Make Triton compile for ``arch`` in this process from now on."""
    triton.runtime.driver.set_active(FakeDriver(target_of(arch)))
