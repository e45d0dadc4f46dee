"""Read and write official checkpoints: ``state.pt`` and ``model_<step>.pt``."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looped_fast.config import ModelConfig
from looped_fast.errors import CheckpointError


@dataclass(frozen=True)
class OfficialCheckpoint:
    """An official ``state.pt`` or ``model_<step>.pt``.

    Attributes:
        model_state: name -> CPU tensor, ready for ``load_state_dict``.
        optimizer_state: state of ``torch.optim.Adam``; None for ``model_<step>.pt``.
        train_step: 0-based index of the last finished training step: training resumes at
            ``train_step + 1``. (The official code repeats ``train_step`` on resuming.) None if
            neither the file nor its name tells.
    """

    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None
    train_step: int | None


def load_official_checkpoint(path: str | Path) -> OfficialCheckpoint:
    """Read an official ``state.pt`` or ``model_<step>.pt``, without running code from it.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt, holds code (which is refused,
            not run), or has another layout.

    Source: official ``scripts/train.py`` and ``scripts/main_utils.py``.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; name a state.pt or model_<step>.pt")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is truncated, or was not written by torch.save; copy it again from its source"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load verifies no checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is corrupt, or holds code or other objects besides tensors "
            f"and plain values, none of which was run ({_refused(error)}). If you trust it, load "
            f"it with the program that wrote it, and save only its state dicts"
        ) from None
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is corrupt ({error}); copy it again from its source"
        ) from None
    found = state if isinstance(state, dict) else {}
    model_state = found.get("model_state_dict", found.get("model"))
    if not isinstance(model_state, dict):
        raise CheckpointError(
            f"{path} is neither a state.pt, which holds a dict model_state_dict, nor a "
            f"model_<step>.pt, which holds a dict model; it holds {list(found) or type(state)}"
        )
    return OfficialCheckpoint(
        model_state={name.removeprefix("_orig_mod."): t for name, t in model_state.items()},
        optimizer_state=found.get("optimizer_state_dict"),
        train_step=found.get("train_step", _step_in_name(path)),
    )


def export_official_checkpoint(
    path: str | Path,
    model_state: dict[str, Tensor],
    optimizer_state: dict[str, Any] | None = None,
    train_step: int | None = None,
) -> None:
    """Write a checkpoint that the official code resumes from, or loads as pretrained.

    Args:
        path: any name with the next two arguments (officially ``state.pt``); without them
            ``model_<step>.pt``, since the official code reads the step from the name.
        model_state: state dict of any model of this library.
        optimizer_state: state dict of ``torch.optim.Adam`` over ``model.parameters()``.
        train_step: 0-based index of the last finished step.

    Raises:
        ValueError: only one of optimizer_state and train_step, or a name without a step.
        OSError: the file can't be written.

    Source: official ``scripts/train.py``.
    """
    path = Path(path)
    if (optimizer_state is None) != (train_step is None):
        raise ValueError("give both optimizer_state and train_step (state.pt), or neither")
    state: dict[str, Any]
    if optimizer_state is not None:
        state = {
            "model_state_dict": model_state,
            "optimizer_state_dict": optimizer_state,
            "train_step": train_step,
        }
    elif _step_in_name(path) is not None:
        state = {"model": model_state}
    else:
        raise ValueError(f"{path} does not name its step; call it model_<step>.pt")
    hidden = path.with_name(f".tmp-{path.name}")
    with open(hidden, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(hidden, path)


def model_config_from_state_dict(
    model_state: dict[str, Tensor], n_head: int, **settings: Any
) -> ModelConfig:
    """The ``ModelConfig`` that fits an official state dict, its sizes read from tensor shapes.

    Args:
        model_state: official names -> tensors.
        n_head: attention heads, which shapes do not tell (8 in the paper).
        settings: the others that shapes do not tell: ``n_loops, window, injection``.

    Raises:
        CheckpointError: a parameter of the official models is missing.
        ValueError: settings out of range.
    """
    try:
        n_embd, n_dims = model_state["_read_in.weight"].shape
        n_rows = model_state["_backbone.transformer.wpe.weight"].shape[0]
        n_outputs = model_state["_read_out.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"no {error} in the state dict; that of an official model is needed"
        ) from None
    return ModelConfig(
        n_dims=n_dims,
        n_positions=(n_rows - 1) // 2,
        n_embd=n_embd,
        n_layer=sum(name.endswith("attn.c_attn.weight") for name in model_state),
        n_head=n_head,
        pred_type="regression" if n_outputs == 1 else "classification",
        **settings,
    )


def _step_in_name(path: Path) -> int | None:
    match = re.fullmatch(r"model_(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def _refused(error: pickle.UnpicklingError) -> str:
    """The gist of torch's message, without its advice to turn the protection off."""
    match = re.search(r"unsupported .*", str(error), re.IGNORECASE)
    return match[0].strip() if match else "not readable as tensors"
