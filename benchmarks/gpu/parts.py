"""Parts of a visit as data, the most valuable first."""

from __future__ import annotations

from typing import NamedTuple

# What ``import looped_fast`` and its trainer need.
_LIBRARY = ("torch", "triton", "numpy", "safetensors", "yaml", "tqdm")
_COMMAND = (*_LIBRARY, "tyro", "tabulate")
_TESTS = (*_COMMAND, "pytest", "hypothesis")


class Part(NamedTuple):
    """A part of a visit; ``benchmarks.gpu.<module>`` has ``run(visit)``, which prints lines."""

    module: str
    limit: int  # seconds; earlier measurements are kept
    summary: str
    needs: tuple[str, ...] = _LIBRARY  # Python modules


PARTS = {
    "compile": Part("compile_cache", 60, "fill Triton's cache, on all cores"),
    "smoke": Part("smoke", 45, "check the loop's numbers against float64"),
    "tests": Part("gpu_tests", 110, "run the tests marked gpu", _TESTS),
    "rows": Part("rows", 100, "check and time every configuration of tiles"),
    "steps": Part("steps", 140, "time training steps and inference against all opponents"),
    "profile": Part("kernel_times", 30, "list the kernels of a training step by time"),
    "pieces": Part("pieces", 30, "measure ceilings, and cuBLAS at the loop's shapes"),
    "train": Part("train", 85, "train the paper's model for a minute, quickly", _COMMAND),
    "paper": Part("paper", 480, "train the paper's model for $SECONDS, pack the run", _COMMAND),
}  # fmt: skip
DEFAULT = tuple(name for name in PARTS if name != "paper")
BUDGET_S = 560  # for all parts: a visit may end after 590
