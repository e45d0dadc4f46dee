"""The choice among a kernel's candidate configurations.

On a GPU the first use times them (``trial.py``) and keeps the fastest on disk; everywhere else, and
where results must not depend on timing, the first candidate is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from looped_fast.ops import cache

from . import trial
from .candidates import Config, architecture, candidates, digest, source_hash
from .launch import postponed

logger = logging.getLogger(__name__)


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
    options_hash = digest([config.astuple() for config in options])
    versions = f"triton {metadata.version('triton')}/{source_hash(kernel)}/{options_hash}"
    key = f"{name}/{versions}/{kernel.__name__}/{width}/{precision}/{_size(n_rows)}"
    with torch.cuda.device(index):
        if (config := _stored().get(key)) is None:
            if torch.cuda.is_current_stream_capturing():
                return options[0]
            if (postpone := postponed()) is not None:
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
    try:
        config = trial.fastest(options, run, precision)
    except trial.NotTimed as error:
        logger.warning("configurations are not timed, taking %s: %s (%s)", error.config, key, error)
        return error.config
    logger.debug("%s: %s", key, config)
    if reason := cache.update(cache_file(), {key: asdict(config)}):
        logger.warning("the choice of a configuration is not kept: %s", reason)
    return config


def cache_file() -> Path:
    """The file where choices are kept."""
    return cache.folder() / "tuning.json"


def _stored() -> dict[str, Config]:
    return {key: Config(**entry) for key, entry in cache.load(cache_file(), _is_config).items()}


def _is_config(entry: Any) -> bool:
    names = {field.name for field in fields(Config)}
    if not isinstance(entry, dict) or set(entry) != names:
        return False
    return all(type(value) is int and value >= 0 for value in entry.values())
