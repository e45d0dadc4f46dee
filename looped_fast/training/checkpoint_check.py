"""Check a checkpoint's content against the model, optimizer and scaler that are to take it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.errors import CheckpointError
from looped_fast.training.checkpoint_read import INDEX, TRAINER, Checkpoint, damaged


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first of ``tensors`` that holds NaN or Inf, or None if all are finite."""
    for name, tensor in tensors.items():
        n_bad = tensor.numel() - int(tensor.isfinite().sum())
        if n_bad:
            return f"{name} holds {n_bad} of {tensor.numel()} numbers that are NaN or Inf"
    return None


def check_weights(source: Path, state: Mapping[str, Tensor], model: nn.Module, hint: str) -> None:
    """Check names, shapes, dtypes and finiteness of weights that ``model`` is to load.

    Args:
        source: file that the weights were read from.
        state: name -> tensor.
        model: its ``state_dict()`` says what is needed.
        hint: the remedy if the weights are of another model.

    Raises:
        CheckpointError: something differs, or a number is NaN or Inf.
    """
    saved = {name: _describe(t) for name, t in state.items()}
    wanted = {name: _describe(t) for name, t in model.state_dict().items()}
    faults = [f"{name} is missing" for name in wanted if name not in saved]
    faults += [f"{name} is unexpected" for name in saved if name not in wanted]
    faults += [
        f"{name} is {saved[name]} in the checkpoint, {wanted[name]} in the model"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{source} is of another model: {'; '.join(faults[:3])}{more}. {hint}"
        )
    if fault := non_finite(state):
        raise CheckpointError(f"{source}: {fault}, so training diverged; use an earlier checkpoint")


def check_optimizer(
    saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, unused: Collection[str]
) -> None:
    """Check the state of Adam.

    Args:
        saved: the checkpoint; its optimizer was over parameters of the same names.
        model: the one to continue with.
        optimizer: the one to continue with, over parameters of ``model``.
        unused: names of parameters that may have no state, since their gradient is always None.

    Raises:
        CheckpointError: a setting or a tensor is missing, unexpected, or of another kind.
    """
    for i, own in enumerate(optimizer.param_groups):
        group = saved.optimizer_state["param_groups"][i]
        for name, value in own.items():
            entry = f"param_groups[{i}].{name}"
            if name not in group and name in ("lr", "eps", "weight_decay"):  # torch adds the others
                raise damaged(saved.path / INDEX, f"lacks the entry {entry}")
            if name in group and name != "params" and not _is_setting(name, group[name], value):
                fault = f"has {entry} = {reprlib.repr(group[name])}, which does not suit Adam here"
                raise damaged(saved.path / INDEX, fault)
    file, state = saved.path / TRAINER, saved.optimizer_state["state"]
    if not state and (saved.step == 0 or saved.scaler_state):
        return  # before the first update, which a loss scale that overflows puts off
    parameters = dict(model.named_parameters())
    n_before = 0
    for own, names in zip(optimizer.param_groups, saved.param_names, strict=True):
        moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if own.get("amsgrad") else ()))
        for i, name in enumerate(names, n_before):
            if i not in state and (name in unused or not parameters[name].requires_grad):
                continue
            needed = {f"{moment}/{name}": _describe(parameters[name]) for moment in moments}
            tensors = {f"{kind}/{name}": tensor for kind, tensor in state.get(i, {}).items()}
            _check_adam(file, f"step/{name}", tensors, needed)
        n_before += len(names)


def check_generators(saved: Checkpoint) -> None:
    """Check the states of torch's generators; raises CheckpointError."""
    file, state = saved.path / TRAINER, saved.rng_state
    try:
        torch.Generator().set_state(state["cpu"])
    except (RuntimeError, TypeError) as error:
        raise damaged(file, f"has a rng/cpu that is no generator's state ({error})") from None
    # A CUDA generator's state is its seed and its offset, a multiple of 4; 8 bytes each.
    cuda = state.get("cuda", torch.zeros(16, dtype=torch.uint8))
    if _describe(cuda) != "uint8 [16]" or cuda[8] % 4:
        raise damaged(file, f"has a rng/cuda that is no generator's state ({_describe(cuda)})")


def check_scaler(saved: Checkpoint, scaler: torch.amp.GradScaler) -> None:
    """Check the state of the gradient scaler, if ``scaler`` is to take it.

    Raises:
        CheckpointError: an entry is missing, unexpected, or out of range.
    """
    ranges: dict[str, tuple[float, float, type]] = {
        "scale": (0, math.inf, float),
        "growth_factor": (1, math.inf, float),
        "backoff_factor": (0, 1, float),
        "growth_interval": (0, math.inf, int),
        "_growth_tracker": (-1, math.inf, int),
    }
    file, state = saved.path / INDEX, saved.scaler_state
    if not scaler.is_enabled() or not state:
        return
    for name in ranges | state:
        if name not in state or name not in ranges:
            raise damaged(
                file, f"{'has an unknown' if name in state else 'lacks the'} entry scaler.{name}"
            )
        low, high, kind = ranges[name]
        if type(state[name]) is not kind or not low < state[name] < high:
            value, what = reprlib.repr(state[name]), "whole number" if kind is int else "number"
            needed = f"a {what} above {low}" + (f" and below {high}" if high < math.inf else "")
            raise damaged(file, f"has scaler.{name} = {value}: {needed} is needed")


def _check_adam(file: Path, step: str, tensors: dict[str, Tensor], moments: dict[str, str]) -> None:
    """Check one parameter's state: its count of steps, and moments of the given descriptions."""
    for entry in {step: "", **moments, **tensors}:
        if entry not in tensors:
            raise damaged(file, f"lacks {entry}")
        if entry != step and entry not in moments:
            raise damaged(file, f"holds {entry}, which Adam does not have")
    count = tensors[step]
    if count.shape or count.dtype not in (torch.float32, torch.float64):
        raise damaged(file, f"has {step} of {_describe(count)}: a float32 [] is needed")
    if not (count >= 0 and count == count.floor()):
        raise damaged(file, f"has {step} = {count.item()}: a count of steps is needed")
    for entry, description in moments.items():
        if _describe(tensors[entry]) != description:
            found = _describe(tensors[entry])
            raise damaged(file, f"has {entry} of {found}: {description} is needed")
        if "_sq/" in entry and (tensors[entry] < 0).any():
            raise damaged(file, f"has negative numbers in {entry}, a mean of squares")
    if fault := non_finite(tensors):
        raise damaged(file, f"can't be used: {fault}")


def _is_setting(name: str, value: Any, own: Any) -> bool:
    """True if Adam can take ``value`` for its setting ``name``, which is ``own`` here."""
    if name in ("foreach", "fused", "capturable"):  # how it computes, not what
        return value is None or isinstance(value, bool)
    if own is None or isinstance(own, bool):
        return value is own
    numbers = value if isinstance(own, tuple) else (value,)
    if isinstance(own, tuple) and len(value) != len(own):
        return False
    limit = 1.0 if name == "betas" else math.inf
    return all(type(x) in (int, float) and 0 <= x < limit for x in numbers)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
