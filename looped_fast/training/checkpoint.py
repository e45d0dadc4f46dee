"""Training checkpoints: safetensors and JSON, written so that a kill can't leave a broken one.

A checkpoint is a directory, ``<run>/checkpoints/step-00001000/``, with

* ``model.safetensors``: the model's state dict, under the official names;
* ``trainer.safetensors``: optimizer and generator state, ``exp_avg/<parameter>``, ``rng/cpu``;
* ``checkpoint.json``: everything else, and size and sha256 of the two files above.

``export_weights`` writes one without the second file, to share: it can be loaded, not resumed.

A checkpoint is built in a hidden sibling, synced to disk, and renamed into place, so that every
visible one is complete. A replaced checkpoint stays visible as ``step-00001000.old`` until its
successor is in place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from looped_fast.config import VERSION
from looped_fast.errors import CheckpointError

FORMAT_VERSION = 1
INDEX, MODEL, TRAINER = "checkpoint.json", "model.safetensors", "trainer.safetensors"
_NAME = re.compile(r"step-(\d{8,})(\.old)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read by ``load``. Tensors are on the CPU, bit for bit as saved.

    Attributes:
        path: the checkpoint's directory.
        step: training steps finished.
        config: the run's configuration, as given to ``save``.
        meta: what else was given to ``save`` (curriculum values, ...).
        model_state: name -> tensor, under the official state-dict names.
        optimizer_state: layout of ``torch.optim.Adam.state_dict()``; empty in exported weights,
            as are the three below.
        param_names: per parameter group, the names of its parameters in order.
        scaler_state: state dict of ``torch.amp.GradScaler``; empty if none was used.
        rng_state: generator state, uint8, under ``cpu`` and, if CUDA was in use, ``cuda``.
    """

    path: Path
    step: int
    config: dict[str, Any]
    meta: dict[str, Any]
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    param_names: list[list[str]]
    scaler_state: dict[str, Any]
    rng_state: dict[str, Tensor]


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return _visible(Path(run_dir) / "checkpoints")


def latest(run_dir: str | Path) -> Path | None:
    """The run's newest complete checkpoint, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def save(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: dict[str, Any],
    meta: dict[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
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
        keep: number of checkpoints to keep, at least 1.

    Raises:
        CheckpointError: the folder can't be written or the disk is full. The attempt leaves no
            files, and earlier checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least 1 checkpoint is kept")
    parent = Path(run_dir) / "checkpoints"
    final = parent / f"step-{step:08d}"
    old = parent / f"{final.name}.old"
    hidden = _hidden(final)
    files = _serialize(step, model, optimizer, config, meta or {}, scaler)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".tmp-*"):  # left by a process that was killed
            shutil.rmtree(leftover)
        hidden.mkdir()
        for name, content in files.items():
            _write(hidden / name, content)
        _sync(hidden)
        if final.exists():
            _remove(old)
            os.rename(final, old)
        os.rename(hidden, final)
        _sync(parent)
        _remove(old)
        kept = [path for path in _visible(parent) if _order(path) <= _order(final)][-keep:]
        for path in _visible(parent):
            if path not in kept:
                _remove(path)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        _explain_failed_write(error, final, sum(map(len, files.values())))
    return final


def load(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint directory.

    Raises:
        CheckpointError: it is missing, truncated, corrupt, or of a newer format. The message names
            an intact older checkpoint of the run if there is one.
    """
    path = Path(path)
    try:
        return _load(path)
    except CheckpointError as error:
        older = [other for other in _visible(path.parent) if _order(other) < _order(path)]
        for other in reversed(older):
            try:
                _load(other)
            except CheckpointError:
                continue
            raise CheckpointError(f"{error}. An intact older one is {other}") from None
        raise CheckpointError(f"{error}. There is no intact older one beside it") from None


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
    weights = {MODEL: _pack(source.model_state)}
    for name, content in {**weights, INDEX: _index(weights, source.step, config, meta)}.items():
        _write(folder / name, content)


def restore_into(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Put a checkpoint's state into a model and, to continue training, its optimizer and scaler.

    With an optimizer, torch's generators are restored too, so that training continues bit for
    bit. Model and optimizer share no memory with the checkpoint.

    Raises:
        CheckpointError: names, shapes or dtypes do not match; nothing was changed.
    """
    _check_model(checkpoint, model)
    if optimizer is not None and not checkpoint.optimizer_state:
        raise CheckpointError(
            f"{checkpoint.path} holds weights only, so no run can resume from it exactly; "
            f"start a new run from it with --init-from {checkpoint.path}"
        )
    if optimizer is not None and _param_names(model, optimizer) != checkpoint.param_names:
        raise CheckpointError(
            f"{checkpoint.path}: the optimizer is over other parameters, or in another order; "
            f"make it as in the run that saved, over model.parameters()"
        )
    model.load_state_dict(checkpoint.model_state)
    if optimizer is not None:
        state = {
            i: {kind: tensor.clone() for kind, tensor in tensors.items()}
            for i, tensors in checkpoint.optimizer_state["state"].items()
        }  # cloned: the optimizer keeps the given tensors, and Adam updates them in place
        groups = checkpoint.optimizer_state["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(checkpoint.rng_state["cpu"])
        if "cuda" in checkpoint.rng_state and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint.rng_state["cuda"])
    if scaler is not None and checkpoint.scaler_state:
        scaler.load_state_dict(checkpoint.scaler_state)


def _serialize(step, model, optimizer, config, meta, scaler) -> dict[str, bytes]:
    """File name -> content. The index comes last, with sizes and hashes of the other files."""
    optimizer_state = optimizer.state_dict()
    groups_of_names = _param_names(model, optimizer)
    names = [name for group in groups_of_names for name in group]
    trainer = {
        f"{kind}/{names[i]}": tensor
        for i, tensors in optimizer_state["state"].items()
        for kind, tensor in tensors.items()
    }
    trainer["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # reading the state would initialise CUDA
        trainer["rng/cuda"] = torch.cuda.get_rng_state()
    files = {MODEL: _pack(model.state_dict()), TRAINER: _pack(trainer)}
    index = _index(
        files,
        step,
        config,
        meta,
        scaler=scaler.state_dict() if scaler is not None else {},
        param_groups=[
            {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
            for group in optimizer_state["param_groups"]
        ],  # JSON takes no tensor, which the learning rate may be
        param_names=groups_of_names,
    )
    return {**files, INDEX: index}


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
    return json.dumps(index, indent=1).encode()


def _pack(tensors: dict[str, Tensor]) -> bytes:
    return to_safetensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _param_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def _load(path: Path) -> Checkpoint:
    index = _read_index(path / INDEX)
    try:
        files = index["files"]
        model_state = parse_safetensors(_read(path / MODEL, files[MODEL]))
        trainer: dict[str, Any] = {
            "optimizer_state": {}, "param_names": [], "scaler_state": {}, "rng_state": {},
        }  # fmt: skip
        if TRAINER in files:
            trainer = _parse_trainer(_read(path / TRAINER, files[TRAINER]), index)
        return Checkpoint(
            path=path,
            step=index["step"],
            config=index["config"],
            meta=index["meta"],
            model_state=model_state,
            **trainer,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / INDEX} is corrupt: {error!r}; delete {path}, or restore it from a copy"
        ) from None


def _parse_trainer(content: bytes, index: dict[str, Any]) -> dict[str, Any]:
    """Parse the fields of ``Checkpoint`` that only training needs."""
    names = [name for group in index["param_names"] for name in group]
    position = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    rng_state: dict[str, Tensor] = {}
    for key, tensor in parse_safetensors(content).items():
        kind, name = key.split("/", 1)
        if kind == "rng":
            rng_state[name] = tensor
        else:
            state.setdefault(position[name], {})[kind] = tensor
    groups = [{**group, "betas": tuple(group["betas"])} for group in index["param_groups"]]
    return {
        "optimizer_state": {"state": dict(sorted(state.items())), "param_groups": groups},
        "param_names": index["param_names"],
        "scaler_state": index["scaler"],
        "rng_state": rng_state,
    }


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(_read(file))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not JSON ({error}), so it is corrupt; delete {file.parent}, or restore "
            f"it from a copy"
        ) from None
    version = index.get("format_version") if isinstance(index, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(
            f"{file} has no format_version, so it is no checkpoint of looped_fast; name a "
            f"directory like run/checkpoints/step-00001000"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, written by looped_fast "
            f"{index.get('looped_fast_version')}; this is {VERSION}, which reads "
            f"up to version {FORMAT_VERSION}: update it with pip install -U looped_fast"
        )
    return index


def _read(file: Path, expected: dict[str, Any] | None = None) -> bytes:
    """Read a file, and check it against its recorded size and hash if they are given."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file} can't be read: {error.strerror}; name a directory like "
            f"run/checkpoints/step-00001000, with {INDEX}, {MODEL} and {TRAINER} in it"
        ) from None
    fault = None
    if expected is not None and len(content) != expected["bytes"]:
        fault = f"has {len(content)} bytes instead of {expected['bytes']}: truncated or overwritten"
    elif expected is not None and hashlib.sha256(content).hexdigest() != expected["sha256"]:
        fault = "is corrupt: its sha256 is not the recorded one"
    if fault:
        raise CheckpointError(f"{file} {fault}; delete {file.parent}, or restore it from a copy")
    return content


def _check_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    def describe(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    saved = {name: describe(t) for name, t in checkpoint.model_state.items()}
    wanted = {name: describe(t) for name, t in model.state_dict().items()}
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
            f"{checkpoint.path / MODEL} is of another model: {'; '.join(faults[:3])}{more}. "
            f"Build the model with the configuration in {checkpoint.path / INDEX}"
        )


def _order(path: Path) -> tuple[int, bool]:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), match[2] is None) if match else (-1, False)


def _visible(parent: Path) -> list[Path]:
    return sorted((p for p in parent.glob("step-*") if _NAME.fullmatch(p.name)), key=_order)


def _hidden(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def _remove(path: Path) -> None:
    """Remove a checkpoint, hiding it first: a kill can't leave a half-deleted one visible."""
    if path.exists():
        os.rename(path, _hidden(path))
        shutil.rmtree(_hidden(path))


def _write(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(directory: Path) -> None:
    """Make new names in the directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain_failed_write(error: OSError, target: Path, size: int) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        remedy = (
            f"it needs {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; free space, or keep "
            f"fewer checkpoints"
        )
    else:
        remedy = "choose an output folder that you may write to"
    previous = next(reversed(_visible(target.parent)), None)
    intact = f". The last good checkpoint is {previous}" if previous else ""
    raise CheckpointError(f"can't write {target}: {error}; {remedy}{intact}") from error
