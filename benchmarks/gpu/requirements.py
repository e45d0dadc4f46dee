"""Requirements of a measurement that a machine lacks, reported before anything starts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec

from benchmarks.gpu.parts import PARTS

PACKAGES = {"yaml": "pyyaml"}  # module -> name on PyPI, if they differ


def problems(parts: Iterable[str], dry: bool) -> list[str]:
    """What ``parts`` lack here, each with its remedy."""
    needed = dict.fromkeys(module for part in parts for module in PARTS[part].needs)
    missing = [module for module in needed if find_spec(module) is None]
    found = []
    if sys.version_info < (3, 10):  # noqa: UP036  # the code runs uninstalled
        found.append(f"{sys.executable} is Python {sys.version.split()[0]}; 3.10 is needed")
    if missing:
        packages = " ".join(PACKAGES.get(module, module) for module in missing)
        found.append(
            f"{sys.executable} has no module {', '.join(missing)}: "
            f"{sys.executable} -m pip install {packages}; without a network, carry wheels "
            f"(benchmarks/gpu/prepare.sh), or leave out the parts that need them"
        )
    if "torch" not in missing:
        reason = _interpreter_problem(missing) if dry else _device_problem()
        found += [reason] if reason else []
    return found


def _device_problem() -> str | None:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"PyTorch {torch.__version__} in {sys.executable} is built without CUDA: install one "
            f"with it (https://pytorch.org/get-started/locally), or choose another Python "
            f"(make gpu-check GPU_PYTHON=...)"
        )
    if not torch.cuda.is_available():
        return (
            f"PyTorch {torch.__version__} in {sys.executable} sees no CUDA device here: run this "
            f"on a machine with one, or --dry for a dry run on the CPU"
        )
    return None


def _interpreter_problem(missing: list[str]) -> str | None:
    if missing:  # importing looped_fast may fail
        return None
    from looped_fast.ops.triton_backend import uninterpretable

    return uninterpretable()
