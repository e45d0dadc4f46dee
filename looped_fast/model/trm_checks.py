"""Checks of what a Tiny Recursive Model is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looped_fast.config import check_whole
from looped_fast.model.prompts import check_tensors
from looped_fast.model.trm_config import TRMConfig
from looped_fast.ops import op
from looped_fast.ops.prompt import check_indices

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_puzzles(config: TRMConfig, inputs: Tensor, identifiers: Tensor | None) -> None:
    """Check tokens, and identifiers if the model embeds these.

    Raises:
        ValueError: shapes or dtypes that do not fit, or values out of range.
        TypeError: no tensor.
    """
    check_tensors(inputs=inputs)
    if inputs.dim() != 2 or inputs.shape[1] != config.seq_len:
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)}; [B, {config.seq_len}] is needed (seq_len): "
            f"pad the puzzles, or build the model with another seq_len"
        )
    _check_integers(inputs=inputs)
    check_indices(
        config.vocab_size, "tokens are below vocab_size; build the model with a larger one, or "
        "renumber the tokens", inputs=inputs,
    )  # fmt: skip
    if not config.puzzle_emb_ndim:
        return
    if identifiers is None:
        raise ValueError(
            f"puzzle_identifiers are missing, but puzzle_emb_ndim = {config.puzzle_emb_ndim}; "
            f"give [B] numbers below {config.num_puzzle_identifiers}"
        )
    check_tensors(puzzle_identifiers=identifiers)
    if identifiers.shape != inputs.shape[:1]:
        raise ValueError(
            f"puzzle_identifiers have shape {tuple(identifiers.shape)}; [{len(inputs)}] is needed, "
            f"one for each puzzle"
        )
    _check_integers(puzzle_identifiers=identifiers)
    check_indices(
        config.num_puzzle_identifiers, "build the model with more num_puzzle_identifiers",
        puzzle_identifiers=identifiers,
    )  # fmt: skip


def check_carry(carry: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two states, as autocast casts them, if they fit the embedded puzzle ``x``.

    Raises:
        ValueError: another shape, dtype or device.
        TypeError: no pair of tensors.
    """
    if not (isinstance(carry, tuple) and len(carry) == 2):
        raise TypeError(
            f"carry is a {type(carry).__name__}; a Carry is needed, that of the step before or "
            f"initial_carry(B)"
        )
    z_H, z_L = carry
    check_tensors(z_H=z_H, z_L=z_L)
    z_H, z_L = op.cast_in_autocast(z_H, x.dtype), op.cast_in_autocast(z_L, x.dtype)
    for name, z in (("z_H", z_H), ("z_L", z_L)):
        if z.shape != x.shape:
            raise ValueError(
                f"carry.{name} has shape {tuple(z.shape)}; {tuple(x.shape)} is needed for these "
                f"inputs, as from initial_carry({len(x)})"
            )
        if z.dtype != x.dtype or z.device != x.device:
            raise ValueError(
                f"carry.{name} is {z.dtype} on {z.device}, the model is {x.dtype} on {x.device}; "
                f"convert with carry.{name}.to(device, dtype)"
            )
    return z_H, z_L


def check_halted(halted: Any, q_halt: Tensor) -> Tensor:
    """Return what a criterion of halting says. Raises ValueError unless it is [m] bool."""
    if not isinstance(halted, Tensor) or halted.dtype != torch.bool:
        kind = halted.dtype if isinstance(halted, Tensor) else type(halted).__name__
        raise ValueError(f"halt returned a {kind}; a bool tensor {list(q_halt.shape)} is needed")
    if halted.shape != q_halt.shape:
        raise ValueError(
            f"halt returned shape {tuple(halted.shape)}; {tuple(q_halt.shape)} is needed, a bool "
            f"for each puzzle that still runs"
        )
    return halted


def check_max_steps(max_steps: int) -> None:
    """Raise ValueError, or TypeError, unless ``max_steps`` is a whole number of at least 1."""
    check_whole("max_steps", max_steps)
    if max_steps < 1:
        raise ValueError(f"max_steps = {max_steps}: at least 1 supervision step is needed")


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError, or TypeError, unless ``batch_size`` is a whole number of at least 0."""
    check_whole("batch_size", batch_size)
    if batch_size < 0:
        raise ValueError(f"batch_size = {batch_size}: at least 0 is needed")


def check_n_points(n_points: int | None, seq_len: int) -> None:
    """Raise ValueError unless ``n_points`` is None, or the length that all puzzles have."""
    if n_points not in (None, seq_len):
        raise ValueError(
            f"n_points = {n_points}, but the model's puzzles have seq_len = {seq_len} tokens; "
            f"leave n_points out"
        )


def _check_integers(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name} are {tensor.dtype}; convert with {name}.long()")
