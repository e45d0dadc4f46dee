"""Tile sizes, warps and pipeline stages of the kernels: candidates, and the choice among them.

The candidates are those that ``python -m benchmarks.compile_report`` found good for an
architecture (``candidates.json``). On a GPU the first use times them (``trial.py``) and keeps the
fastest on disk; everywhere else, and where results must not depend on timing, the first
candidate is used.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import hashlib
import inspect
import json
import logging
import os
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


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
    return json.loads(Path(__file__).with_name("candidates.json").read_text())


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


_chosen: dict[tuple[Any, ...], Config] = {}  # in this process


def choose(
    kernel: Any,
    *,
    width: int,
    precision: str,
    n_rows: int,
    device: torch.device,
    run: Callable[[Config], None],
) -> Config:
    """The configuration to launch ``kernel`` with.

    On a GPU, the fastest of ``candidates`` whose results are right, see ``trial``: found once for
    ``n_rows`` (rounded up to a power of two) and stored in the user's cache folder. The first
    candidate, without timing, off a GPU, under ``torch.use_deterministic_algorithms(True)``, and if
    a CUDA graph is being captured before a choice was stored.

    Args:
        kernel: the ``@triton.jit`` function.
        width: D, or head_dim for an attention kernel.
        precision: of operands of matrix products, as in ``operand_precision``.
        n_rows: rows N that the kernel works on.
        device: where it runs.
        run: launches the kernel once, in its most frequent form, with a configuration. Only shapes
            and alignments of its tensors matter: the trial has tensors of its own.

    Raises:
        RuntimeError: no candidate runs on this GPU.
    """
    if not _may_time(device):
        return candidates(kernel.__name__, architecture(device), width, precision)[0]
    index = torch.cuda.current_device() if device.index is None else device.index
    case = (kernel.__name__, width, precision, _size(n_rows), index)
    if case in _chosen:
        return _chosen[case]

    options = candidates(kernel.__name__, architecture(device), width, precision)
    if len(options) == 1:
        return options[0]
    name = torch.cuda.get_device_name(index)
    options_hash = _digest([config.astuple() for config in options])
    versions = f"triton {metadata.version('triton')}/{source_hash(kernel)}/{options_hash}"
    key = f"{name}/{versions}/{kernel.__name__}/{width}/{precision}/{_size(n_rows)}"
    with torch.cuda.device(index):
        if (config := _load().get(key)) is None:
            if torch.cuda.is_current_stream_capturing():
                return options[0]
            if (postpone := _postpone.get()) is not None:
                retry = functools.partial(
                    choose, kernel, width=width, precision=precision, n_rows=n_rows, device=device,
                    run=run,
                )  # fmt: skip
                postpone(kernel, functools.partial(_run_all, run, options), retry)
                return options[0]
            config = _fastest(key, options, run, precision)
    _chosen[case] = config
    return config


def _may_time(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def _run_all(run: Callable[[Config], None], options: Sequence[Config]) -> None:
    for config in options:
        run(config)


def _size(n_rows: int) -> int:
    return 1 << (n_rows - 1).bit_length()


def _fastest(
    key: str, options: Sequence[Config], run: Callable[[Config], None], precision: str
) -> Config:
    from . import trial  # a circular import at the top

    try:
        config = trial.fastest(options, run, precision)
    except trial.NotTimed as error:
        logger.warning("configurations are not timed, taking %s: %s (%s)", error.config, key, error)
        return error.config
    logger.debug("%s: %s", key, config)
    _save(key, config)
    return config


# Called for a pending choice: (kernel, function that runs all candidates, function that chooses).
Postpone = Callable[[Any, Callable[[], None], Callable[[], Config]], None]
_postpone: contextvars.ContextVar[Postpone | None] = contextvars.ContextVar(
    "looped_fast_postpone", default=None
)


@contextlib.contextmanager
def postponing(postpone: Postpone) -> Iterator[None]:
    """Pass pending choices in the block to ``postpone``; ``choose`` returns the first candidate."""
    token = _postpone.set(postpone)
    try:
        yield
    finally:
        _postpone.reset(token)


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
    return _digest(found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def cache_file() -> Path:
    """File of stored choices, under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "looped_fast", "tuning.json")


def _load() -> dict[str, Config]:
    names = {field.name for field in fields(Config)}
    try:
        kept = json.loads(cache_file().read_text())
        return {key: Config(**value) for key, value in kept.items() if set(value) == names}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("can't read %s, tuning afresh: %s", cache_file(), error)
        return {}


def _save(key: str, config: Config) -> None:
    path = cache_file()
    kept = {name: asdict(value) for name, value in (_load() | {key: config}).items()}
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept, indent=1, sort_keys=True))
        temporary.replace(path)
    except OSError as error:
        logger.warning("can't keep the choice of configuration in %s: %s", path, error)
