"""Read and write official checkpoints: ``state.pt`` and ``model_<step>.pt``."""

from __future__ import annotations

import io
import os
import pickle
import re
import reprlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from looped_fast.config import ModelConfig
from looped_fast.errors import MOST_WEIGHTS, CheckpointError
from looped_fast.training.durable import when_free, write_durably

MOST_STEPS = 10**12


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
            not run), has another layout, or an entry that no such file has: a number that is not
            finite, an optimizer state that does not fit the weights. The message names the entry.

    Source: official ``scripts/train.py`` and ``scripts/main_utils.py``.
    """
    path = Path(path)
    state = unpickle(path, "a state.pt or model_<step>.pt")
    found = state if isinstance(state, dict) else {}
    model_state = found.get("model_state_dict", found.get("model"))
    if not isinstance(model_state, dict):
        raise CheckpointError(
            f"{path} is neither a state.pt, which holds a dict model_state_dict, nor a "
            f"model_<step>.pt, which holds a dict model; it holds {list(found) or type(state)}"
        )
    entry = "model_state_dict" if "model_state_dict" in found else "model"
    for name, tensor in model_state.items():
        if not isinstance(name, str):
            raise _wrong(path, entry, f"the name {_short(name)}", "text")
        check_tensor(path, f"{entry}[{name!r}]", tensor)
    weights = {name.removeprefix("_orig_mod."): t for name, t in model_state.items()}
    if len(weights) < len(model_state):
        raise _wrong(path, entry, "names twice, with and without _orig_mod.", "each one once")
    optimizer_state = found.get("optimizer_state_dict")
    if optimizer_state is not None:
        _check_adam(path, optimizer_state, len(weights))
    train_step = found.get("train_step", _step_in_name(path))
    if train_step is not None and (
        type(train_step) is not int or not 0 <= train_step <= MOST_STEPS
    ):
        raise _wrong(
            path, "train_step", _short(train_step), f"a whole number from 0 to {MOST_STEPS}"
        )
    return OfficialCheckpoint(
        model_state=weights,
        optimizer_state=optimizer_state,
        train_step=train_step,
    )


def unpickle(path: Path, what: str) -> Any:
    """What ``torch.save`` wrote to ``path``, if it is whole, and tensors and plain values only.

    ``what`` says in an error which file to name. Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file; name {what}")
    if path.stat().st_size > MOST_WEIGHTS:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, and at most {MOST_WEIGHTS} are read"
        )
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is truncated, or was not written by torch.save; copy it again from its source"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            packed = [info for info in records if info.compress_type]
            if packed:  # it may hold a thousand times the size of the file
                raise zipfile.BadZipFile(f"{packed[0].filename} is compressed")
            damaged = archive.testzip()  # torch.load verifies no checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = [t for t in tree_leaves(state) if isinstance(t, Tensor)]
        storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
        needed = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        if needed > sum(info.file_size for info in records if "/data/" in info.filename):
            raise zipfile.BadZipFile("a tensor is cut")  # not every PyTorch looks
        return state
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is corrupt, or holds code or other objects besides tensors "
            f"and plain values, none of which was run ({_refused(error)}). If you trust it, load "
            f"it with the program that wrote it, and save only its state dicts"
        ) from None
    except MemoryError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    except Exception as error:  # a pickle that is cut, or changed, can end in any of them
        raise CheckpointError(
            f"{path} is corrupt ({type(error).__name__}: {error}); copy it again from its source"
        ) from None


def _check_adam(path: Path, state: Any, n_parameters: int) -> None:
    """Raise CheckpointError unless ``state`` is that of Adam over that many parameters.

    Their order, and so their shapes, are known to the model only, see ``Stepper``.
    """
    section = "optimizer_state_dict"
    if not isinstance(state, dict):
        raise _wrong(path, section, _short(state), "a dict with state and param_groups")
    if not isinstance(state.get("state"), dict):
        raise _wrong(path, f"{section}.state", _short(state.get("state")), "a dict")
    if not isinstance(state.get("param_groups"), list):
        raise _wrong(path, f"{section}.param_groups", _short(state.get("param_groups")), "a list")
    for i, moments in state["state"].items():
        if type(i) is not int or not 0 <= i < n_parameters:
            needed = f"the position of a parameter, 0 to {n_parameters - 1},"
            raise _wrong(path, f"{section}.state", f"the entry {_short(i)}", needed)
        entry = f"{section}.state[{i}]"
        if not isinstance(moments, dict) or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise _wrong(path, entry, _short(moments), "a dict of step, exp_avg and exp_avg_sq")
        for kind in ("exp_avg", "exp_avg_sq"):
            check_tensor(path, f"{entry}.{kind}", moments[kind])
        if (moments["exp_avg_sq"] < 0).any():
            raise _wrong(path, f"{entry}.exp_avg_sq", "negative numbers", "a mean of squares")
        step = moments["step"]  # a plain number before PyTorch 1.12
        step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
        if type(step) not in (int, float) or not 0 <= step <= MOST_STEPS:
            raise _wrong(path, f"{entry}.step", _short(step), f"a number from 0 to {MOST_STEPS}")


def check_tensor(path: Path, entry: str, value: Any) -> None:
    """Raise CheckpointError unless ``value`` is a dense floating-point tensor of finite numbers."""
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or not value.is_floating_point()
    ):
        raise _wrong(path, entry, _short(value), "a dense floating-point tensor")
    n_bad = value.numel() - int(value.isfinite().sum())
    if n_bad:
        raise _wrong(path, entry, f"{n_bad} of {value.numel()} numbers NaN or Inf", "finite ones")


def _wrong(path: Path, entry: str, found: str, needed: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {entry} holds {found}, and {needed} is needed; export it again, or use another "
        f"checkpoint"
    )


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, int) and abs(value) > MOST_STEPS:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)


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
    write_pickle(path, state)


def write_pickle(path: Path, state: dict[str, Any]) -> None:
    """Write what ``torch.save`` makes of ``state``, at once or not at all."""
    hidden, packed = path.with_name(f".tmp-{path.name}"), io.BytesIO()
    torch.save(state, packed)
    write_durably(hidden, packed.getvalue())
    when_free(os.replace, hidden, path)


def model_config_from_state_dict(
    model_state: dict[str, Tensor], n_head: int, **settings: Any
) -> ModelConfig:
    """The ``ModelConfig`` that fits an official state dict, its sizes read from tensor shapes.

    Args:
        model_state: official names -> tensors.
        n_head: attention heads, which shapes do not tell (8 in the paper).
        settings: the others that shapes do not tell: ``n_loops, window, injection``.

    Raises:
        CheckpointError: a parameter of the official models is missing, or no matrix.
        ValueError: settings out of range.
    """
    shapes = []
    for name in ("_read_in.weight", "_backbone.transformer.wpe.weight", "_read_out.weight"):
        if name not in model_state or model_state[name].ndim != 2:
            raise CheckpointError(
                f"no matrix {name!r} in the state dict; that of an official model is needed"
            )
        shapes.append(model_state[name].shape)
    (n_embd, n_dims), (n_rows, _), (n_outputs, _) = shapes
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
