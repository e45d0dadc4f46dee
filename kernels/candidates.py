"""Tile sizes, warps and pipeline stages of the kernels: those worth trying on an architecture.

``python -m benchmarks.compile_report`` found them good (``candidates.json``).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import textwrap
import types
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs and compiled; a tile size that it does not use is 0."""

    rows: int  # rows (attention: queries) of one program
    hidden_chunk: int = 0  # hidden units (of 4D) worked on at a time
    columns: int = 0  # output columns (attention: keys) worked on at a time
    num_warps: int = 4
    num_stages: int = 2  # of the software pipeline that loads operands

    def astuple(self) -> tuple[int, ...]:
        """Values for JSON; ``Config(*values)`` restores the configuration."""
        return astuple(self)

    def tiles(self, parameters: Sequence[str]) -> dict[str, int]:
        """The tile sizes among a kernel's ``parameters``, as its constexprs."""
        named = {
            "ROWS": self.rows, "HIDDEN_CHUNK": self.hidden_chunk, "COLUMNS": self.columns,
        }  # fmt: skip
        return {name: size for name, size in named.items() if name in parameters}


def architecture(device: torch.device) -> str:
    """Architecture, ``"sm_90"`` or ``"gfx942"``, say; ``"sm_80"`` for a CPU (the interpreter)."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def operand_precision(dtype: torch.dtype) -> str:
    """Precision of products of ``dtype`` operands: ``bf16``, ``fp16``, ``fp32``, or ``tf32``.

    ``tf32`` if PyTorch's own float32 products on GPUs use it: ``torch.backends.cuda.matmul``.
    """
    if dtype != torch.float32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9, where allow_tf32 may raise
        return "tf32" if matmul.fp32_precision == "tf32" else "fp32"
    return "tf32" if matmul.allow_tf32 else "fp32"


# Architectures that the compile report lacks -> the nearest one with no more shared memory.
_LIKE = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}


@functools.cache
def _all_candidates() -> dict[str, dict[str, dict[str, list[list[int]]]]]:
    return json.loads(Path(__file__).with_name("candidates.json").read_bytes())


@functools.cache
def candidates(kernel: str, arch: str, width: int, precision: str) -> tuple[Config, ...]:
    """Configurations of a kernel that suit an architecture, the most promising first.

    Args:
        kernel: name of the kernel.
        arch: as in ``architecture``; one unknown to the compile report gets what suits ``sm_89``,
            which has the least shared memory.
        width: D, or head_dim for an attention kernel.
        precision: of operands of matrix products, as in ``operand_precision``.

    Raises:
        ValueError: no configuration is good.
    """
    by_arch = _all_candidates()[kernel]
    arch = _LIKE.get(arch, arch)
    suited = by_arch[arch if arch in by_arch else "sm_89"]
    if not (found := suited.get(f"{width} {precision}")):
        raise ValueError(
            f"no configuration of {kernel} is good on {arch} at width {width} in {precision}; "
            f"use another precision, or another backend"
        )
    return tuple(Config(*values) for values in found)


def source_hash(kernel: Any) -> str:
    """Hash of the code of a ``@triton.jit`` function and all that it calls, without comments."""
    return _source_hash(kernel.fn)  # hash(kernel) is Triton's key, see ``launch.settle_cache_key``


@functools.cache
def _source_hash(kernel: types.FunctionType) -> str:
    found: dict[str, str] = {}

    def visit(function: types.FunctionType) -> None:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        found[function.__name__] = ast.unparse(tree)
        for name in function.__code__.co_names:
            value: Any = function.__globals__.get(name)
            if hasattr(value, "fn"):
                if value.fn.__name__ not in found:
                    visit(value.fn)
            elif isinstance(getattr(value, "value", None), int | float):  # a global constexpr
                found[name] = repr(value.value)

    visit(kernel)
    found.pop("INTERPRET", None)  # differs between runs of the same source
    return digest(found)


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
