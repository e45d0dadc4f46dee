"""Training checkpoints: safetensors and JSON, written so that a kill can't leave a broken one.

A checkpoint is a directory, ``<run>/checkpoints/step-00001000/``, with

* ``model.safetensors``: the model's state dict, under the official names;
* ``trainer.safetensors``: optimizer and generator state, ``exp_avg/<parameter>``, ``rng/cpu``, and
  what else a trainer continues with, ``run/<name>``;
* ``checkpoint.json``: everything else, size and sha256 of the two files above, and its own sha256.

``export_weights`` writes one without the second file, to share: it can be loaded, not resumed.

A checkpoint is built in a hidden sibling, synced to disk, and renamed into place, so that every
visible one is complete. A replaced checkpoint stays visible as ``step-00001000.old`` until its
successor is in place. Only one process at a time writes a run's folder, see ``lock``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from looped_fast.config import VERSION
from looped_fast.errors import CheckpointError
from looped_fast.model.sharing import pack
from looped_fast.training.checkpoint_check import (
    check_generators,
    check_optimizer,
    check_scaler,
    check_weights,
    non_finite,
)
from looped_fast.training.checkpoint_read import (
    FORMAT_VERSION,
    INDEX,
    MODEL,
    RUN,
    TRAINER,
    Checkpoint,
    checkpoints,
    latest,
    load,
    order,
    sealed,
    visible,
)
from looped_fast.training.durable import sync_names, when_free, write_durably
from looped_fast.training.lock import hold

__all__ = [
    "INDEX", "MODEL", "TRAINER", "Checkpoint", "CheckpointError", "checkpoints",
    "export_weights", "latest", "load", "non_finite_state", "restore_into", "save", "tidy",
]  # fmt: skip

logger = logging.getLogger(__name__)


def save(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: dict[str, Any],
    meta: dict[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    average: nn.Module | None = None,
    run_state: Mapping[str, Tensor] = {},
    keep: int = 3,
) -> Path:
    """Write ``<run_dir>/checkpoints/step-<step>`` atomically, and keep the last ``keep``.

    Afterwards ``latest`` returns it: a checkpoint of the same step is replaced, and those of later
    steps, left by a run that has been rewound, are removed.

    Args:
        run_dir: the run's output folder; created if absent.
        step: training steps finished.
        model: its ``state_dict()`` is saved.
        optimizer: ``torch.optim.Adam`` over parameters of ``model``.
        config: the run's configuration; JSON values.
        meta: anything else that resuming needs; JSON values.
        scaler: the gradient scaler of an fp16 run.
        average: its ``state_dict()`` is saved in place of that of ``model``, which ``run_state``
            then has to hold.
        run_state: name -> tensor, anything else that resuming needs.
        keep: number of checkpoints to keep, at least 1.

    Raises:
        CheckpointError: the folder can't be written or the disk is full. The attempt leaves no
            files, and earlier checkpoints are untouched.
        InUseError: another process writes to the run's folder.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least 1 checkpoint is kept")
    final = Path(run_dir) / "checkpoints" / f"step-{step:08d}"
    hidden = _hidden(final)
    weights = (model if average is None else average).state_dict()
    files = _serialize(step, model, optimizer, config, meta or {}, scaler, weights, run_state)
    try:
        with hold(run_dir):
            final.parent.mkdir(parents=True, exist_ok=True)
            _remove_hidden(final.parent)
            hidden.mkdir()
            for name, content in files.items():
                write_durably(hidden / name, content)
            sync_names(hidden)
            if final.exists():
                old = final.with_name(f"{final.name}.old")
                _remove(old)
                when_free(os.rename, final, old)
            when_free(os.rename, hidden, final)
            sync_names(final.parent)
            _prune(final.parent, keep, final)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        _explain_failed_write(error, final, sum(map(len, files.values())))
    return final


def tidy(run_dir: str | Path, keep: int) -> None:
    """Remove what a kill during ``save`` left: hidden folders, and checkpoints beyond ``keep``.

    Raises:
        CheckpointError: a folder can't be removed.
        InUseError: another process writes to the run's folder.
    """
    parent = Path(run_dir) / "checkpoints"
    try:
        with hold(run_dir):
            _remove_hidden(parent)
            if found := visible(parent):
                _prune(parent, keep, found[-1])
    except OSError as error:
        raise CheckpointError(
            f"can't remove what a killed run left in {parent}: {error}"
        ) from error


def export_weights(
    source: Checkpoint, folder: str | Path, *, config: dict[str, Any], meta: dict[str, Any]
) -> None:
    """Write ``source`` to ``folder`` without optimizer and generators: a third of the size.

    ``load`` reads the result, and ``looped_fast.train --init-from`` starts from it.

    Args:
        source: the checkpoint to share.
        folder: created if absent; its two files are replaced.
        config: the run's configuration, which replaces that of ``source``.
        meta: anything that readers should know; JSON values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {MODEL: pack(source.model_state)}
    for name, content in {**weights, INDEX: _index(weights, source.step, config, meta)}.items():
        write_durably(folder / name, content)


def restore_into(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    unused: Collection[str] = (),
) -> None:
    """Put a checkpoint's state into a model and, to continue training, its optimizer and scaler.

    With an optimizer, torch's generators are restored too, so that training continues bit for
    bit. Model and optimizer share no memory with the checkpoint.

    Args:
        checkpoint: from ``load``.
        model: takes the weights.
        optimizer: ``torch.optim.Adam`` over parameters of ``model``, in the order of the run.
        scaler: takes the loss scale, if the run had one.
        unused: names of parameters without gradient, for which Adam may have no state.

    Raises:
        CheckpointError: something is missing or unexpected, has another shape or dtype, is out of
            range, NaN or Inf. The message names file and entry; nothing was changed.
        ValueError: ``optimizer`` is over parameters of another model.
    """
    check_weights(
        checkpoint.path / MODEL, checkpoint.model_state, model,
        f"Build the model with the configuration in {checkpoint.path / INDEX}",
    )  # fmt: skip
    if optimizer is not None:
        if not checkpoint.optimizer_state:
            raise CheckpointError(
                f"{checkpoint.path} holds weights only, so no run can resume from it exactly; "
                f"start a new run from it with --init-from {checkpoint.path}"
            )
        if _param_names(model, optimizer) != checkpoint.param_names:
            raise CheckpointError(
                f"{checkpoint.path}: the optimizer is over other parameters, or in another order; "
                f"make it as in the run that saved, over model.parameters()"
            )
        check_optimizer(checkpoint, model, optimizer, unused)
        check_generators(checkpoint)
    if scaler is not None:
        check_scaler(checkpoint, scaler)
    model.load_state_dict(checkpoint.model_state)
    if optimizer is not None:
        state = {
            i: {kind: tensor.clone() for kind, tensor in tensors.items()}
            for i, tensors in checkpoint.optimizer_state["state"].items()
        }  # cloned: the optimizer keeps the given tensors, and Adam updates them in place
        groups = checkpoint.optimizer_state["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        _restore_generators(checkpoint)
    if scaler is not None and checkpoint.scaler_state:
        scaler.load_state_dict(checkpoint.scaler_state)


def non_finite_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Name the first tensor of a checkpoint's state that holds NaN or Inf, or None."""
    return non_finite({**model.state_dict(), **_adam_state(model, optimizer)})


def _restore_generators(checkpoint: Checkpoint) -> None:
    torch.set_rng_state(checkpoint.rng_state["cpu"])
    if "cuda" not in checkpoint.rng_state:
        return
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint.rng_state["cuda"])
    else:
        logger.warning(
            "%s was saved on a GPU; there is none here, so the state of its generator is dropped",
            checkpoint.path,
        )


def _serialize(
    step, model, optimizer, config, meta, scaler, weights, run_state
) -> dict[str, bytes]:
    """File name -> content. The index comes last, with sizes and hashes of the other files."""
    trainer = {**_adam_state(model, optimizer), "rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # reading the state would initialise CUDA
        trainer["rng/cuda"] = torch.cuda.get_rng_state()
    trainer |= {f"{RUN}/{name}": tensor for name, tensor in run_state.items()}
    files = {MODEL: pack(weights), TRAINER: pack(trainer)}
    index = _index(
        files,
        step,
        config,
        meta,
        scaler=scaler.state_dict() if scaler is not None else {},
        param_groups=[
            {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
            for group in optimizer.state_dict()["param_groups"]
        ],  # JSON takes no tensor, which the learning rate may be
        param_names=_param_names(model, optimizer),
    )
    return {**files, INDEX: index}


def _adam_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for group in _param_names(model, optimizer) for name in group]
    return {
        f"{kind}/{names[i]}": tensor
        for i, tensors in optimizer.state_dict()["state"].items()
        for kind, tensor in tensors.items()
    }


def _index(files: dict[str, bytes], step, config, meta, **trainer: Any) -> bytes:
    index = {
        "format_version": FORMAT_VERSION,
        "looped_fast_version": VERSION,
        "torch_version": str(torch.__version__),
        "step": step,
        "config": config,
        "meta": meta,
        **trainer,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    return json.dumps(sealed(index), indent=1).encode()


def _param_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    for parameter in (p for group in groups for p in group if p not in names):
        raise ValueError(
            f"the optimizer holds a parameter of shape {list(parameter.shape)} that is not the "
            f"model's; make it over model.parameters()"
        )
    return [[names[p] for p in group] for group in groups]


def _hidden(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def _remove_hidden(parent: Path) -> None:
    for leftover in parent.glob(_hidden(Path("*")).name):  # of a process that was killed
        when_free(shutil.rmtree, leftover)


def _prune(parent: Path, keep: int, newest: Path) -> None:
    """Keep ``keep`` checkpoints up to ``newest``, and none that has been replaced."""
    found = visible(parent)
    current = [p for p in found if p.suffix != ".old" or p.with_suffix("") not in found]
    kept = [p for p in current if order(p) <= order(newest)][-keep:]
    for path in found:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, hiding it first: a kill can't leave a half-deleted one visible."""
    if path.exists():
        when_free(os.rename, path, _hidden(path))
        when_free(shutil.rmtree, _hidden(path))


def _explain_failed_write(error: OSError, target: Path, size: int) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        remedy = (
            f"it needs {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; free space, or keep "
            f"fewer checkpoints"
        )
    else:
        remedy = "choose an output folder that you may write to"
    previous = next(reversed(visible(target.parent)), None)
    intact = f". The last good checkpoint is {previous}" if previous else ""
    raise CheckpointError(f"can't write {target}: {error}; {remedy}{intact}") from error
