"""Find checkpoints, and read them: files, hashes and entries are verified before any is used."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse_safetensors
from torch import Tensor

from looped_fast.config import VERSION
from looped_fast.errors import MOST_WEIGHTS, CheckpointError, read_file, read_json

FORMAT_VERSION = 1
INDEX, MODEL, TRAINER = "checkpoint.json", "model.safetensors", "trainer.safetensors"
RUN = "run"  # kind of entries of TRAINER that belong to no parameter
_NAME = re.compile(r"step-(\d{8,})(\.old)?")

# Entries of the index. An older one has no hash of its own.
_ENTRIES = {"format_version": int, "step": int, "config": dict, "meta": dict, "files": dict}
_TRAINER_ENTRIES = {"scaler": dict, "param_groups": list, "param_names": list}
_OPTIONAL_ENTRIES = {"looped_fast_version": str, "torch_version": str, "sha256": str}
_FILE_ENTRIES = {"bytes": int, "sha256": str}
_NEEDED: dict[type, str] = {int: "a whole number", str: "a text", dict: "a mapping", list: "a list"}


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
        run_state: what else the trainer gave to ``save``.
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
    run_state: dict[str, Tensor]


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return visible(Path(run_dir) / "checkpoints")


def latest(run_dir: str | Path) -> Path | None:
    """The run's newest complete checkpoint, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def visible(parent: Path) -> list[Path]:
    """The complete checkpoints in ``parent``, oldest first."""
    return sorted((p for p in parent.glob("step-*") if _NAME.fullmatch(p.name)), key=order)


def order(path: Path) -> tuple[int, bool]:
    """Sort key of checkpoints: a replaced one (``.old``) is older than its successor."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), match[2] is None) if match else (-1, False)


def load(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint directory.

    Raises:
        CheckpointError: it is missing, truncated, corrupt, or of a newer format. The message names
            file and entry, and an intact older checkpoint of the run if there is one.
    """
    path = Path(path)
    try:
        return _load(path)
    except CheckpointError as error:
        older = [other for other in visible(path.parent) if order(other) < order(path)]
        for other in reversed(older):
            try:
                _load(other)
            except CheckpointError:
                continue
            raise CheckpointError(f"{error}. An intact older one is {other}") from None
        raise CheckpointError(f"{error}. There is no intact older one beside it") from None


def sealed(index: dict[str, Any]) -> dict[str, Any]:
    """``index`` with a hash of its other entries, which ``load`` compares."""
    return {**index, "sha256": _digest(index)}


def damaged(file: Path, fault: str) -> CheckpointError:
    """Make the error for a ``file`` of a checkpoint that can't be used."""
    return CheckpointError(f"{file} {fault}; delete {file.parent}, or restore it from a copy")


def _digest(index: dict[str, Any]) -> str:
    entries = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _load(path: Path) -> Checkpoint:
    index = _read_index(path / INDEX)
    files = index["files"]
    model_state = _parse(path / MODEL, files[MODEL])
    trainer: dict[str, Any] = {
        "optimizer_state": {}, "param_names": [], "scaler_state": {}, "rng_state": {},
        "run_state": {},
    }  # fmt: skip
    if TRAINER in files:
        trainer = _parse_trainer(path, index)
    return Checkpoint(
        path=path,
        step=index["step"],
        config=index["config"],
        meta=index["meta"],
        model_state=model_state,
        **trainer,
    )


def _parse_trainer(path: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Parse the fields of ``Checkpoint`` that only training needs."""
    file = path / TRAINER
    names = [name for group in index["param_names"] for name in group]
    position = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    rng_state: dict[str, Tensor] = {}
    run_state: dict[str, Tensor] = {}
    for key, tensor in _parse(file, index["files"][TRAINER]).items():
        kind, _, name = key.partition("/")
        if kind == "rng" and name in ("cpu", "cuda"):
            rng_state[name] = tensor
        elif kind == RUN:
            run_state[name] = tensor
        elif name in position:
            state.setdefault(position[name], {})[kind] = tensor
        else:
            raise damaged(file, f"holds {key!r}, which is of no parameter in {INDEX}")
    if "cpu" not in rng_state:
        raise damaged(file, "lacks rng/cpu, the state of the generator")
    groups = [{**group, "betas": tuple(group["betas"])} for group in index["param_groups"]]
    return {
        "optimizer_state": {"state": dict(sorted(state.items())), "param_groups": groups},
        "param_names": index["param_names"],
        "scaler_state": index["scaler"],
        "rng_state": rng_state,
        "run_state": run_state,
    }


def _parse(file: Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file of the given size and hash."""
    try:
        content = read_file(file, MOST_WEIGHTS)
    except OSError as error:
        raise _unreadable(file, error) from None
    except ValueError as error:
        raise CheckpointError(f"{error}; restore it from a copy") from None
    if len(content) != expected["bytes"]:
        fault = f"has {len(content)} bytes instead of {expected['bytes']}: truncated or overwritten"
        raise damaged(file, fault)
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise damaged(file, "is corrupt: its sha256 is not the recorded one")
    return parse_weights(file, content)


def parse_weights(file: Path, content: bytes) -> dict[str, Tensor]:
    """Parse a safetensors file's content. Raises CheckpointError."""
    try:
        return parse_safetensors(content)
    except Exception as error:  # the parser lets a bad header raise what it happens to hit
        raise damaged(file, f"is no safetensors file ({error})") from None


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = read_json(file)
        digest = _digest(index)
    except OSError as error:
        raise _unreadable(file, error) from None
    except ValueError as error:
        raise CheckpointError(
            f"{error}; it is corrupt: delete {file.parent}, or restore it from a copy"
        ) from None
    except RecursionError:
        raise damaged(file, "is nested too deep") from None
    if "format_version" not in index:
        raise CheckpointError(
            f"{file} has no format_version, so it is no checkpoint of looped_fast; name a "
            f"directory like run/checkpoints/step-00001000"
        )
    check_types(file, index, {"format_version": int})
    version = index["format_version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, written by looped_fast "
            f"{index.get('looped_fast_version')}; this is {VERSION}, which reads "
            f"up to version {FORMAT_VERSION}; install a newer looped_fast"
        )
    if index.get("sha256", digest) != digest:
        raise damaged(file, "is corrupt: its sha256 is not the recorded one")
    _check_index(file, index)
    return index


def _check_index(file: Path, index: dict[str, Any]) -> None:
    """Check all entries but those inside ``config`` and ``meta``."""
    check_types(file, index, _ENTRIES)
    has_trainer = TRAINER in index["files"] or any(name in index for name in _TRAINER_ENTRIES)
    if has_trainer:
        check_types(file, index, _TRAINER_ENTRIES)
    known = _ENTRIES | _OPTIONAL_ENTRIES | _TRAINER_ENTRIES
    for name in index:
        if name not in known:
            raise damaged(file, f"has an unknown entry {name!r}")
    for name, least in (("format_version", 1), ("step", 0)):
        if not least <= index[name] < 2**63:
            raise _wrong(file, name, index[name], f"a number from {least} to 2^63 - 1")
    files = {MODEL: dict, TRAINER: dict} if has_trainer else {MODEL: dict}
    check_types(file, index["files"], files, "files.")
    for name, entry in index["files"].items():
        if name not in files:
            raise damaged(file, f"has an unknown entry files.{name}")
        check_types(file, entry, _FILE_ENTRIES, f"files.{name}.")
    if has_trainer:
        _check_groups(file, index["param_groups"], index["param_names"])


def _check_groups(file: Path, groups: list[Any], names: list[Any]) -> None:
    """Check that parameter groups and their names have one layout, that of Adam."""
    if len(groups) != len(names):
        raise damaged(file, f"has {len(groups)} param_groups and {len(names)} param_names")
    n_named = 0
    for i, (group, group_names) in enumerate(zip(groups, names, strict=True)):
        entries = {f"param_names[{i}]": group_names, f"param_groups[{i}]": group}
        check_types(file, entries, {f"param_names[{i}]": list, f"param_groups[{i}]": dict})
        for name in group_names:
            if not isinstance(name, str):
                raise _wrong(file, f"param_names[{i}]", name, _NEEDED[str])
        check_types(file, group, {"betas": list, "params": list}, f"param_groups[{i}].")
        positions = list(range(n_named, n_named + len(group_names)))
        if group["params"] != positions:
            needed = f"the positions of the {len(group_names)} names in param_names[{i}]"
            raise _wrong(file, f"param_groups[{i}].params", group["params"], needed)
        n_named += len(group_names)
    if len({name for group_names in names for name in group_names}) < n_named:
        raise damaged(file, "names a parameter twice in param_names")


def check_types(
    file: Path, entries: dict[str, Any], types: Mapping[str, type], prefix: str = ""
) -> None:
    """Raise CheckpointError unless ``entries`` of a file has all of ``types``, of these types."""
    for name, kind in types.items():
        if name not in entries:
            raise damaged(file, f"lacks the entry {prefix}{name}")
        if type(entries[name]) is not kind:  # True is an int, too
            raise _wrong(file, prefix + name, entries[name], _NEEDED[kind])


def _wrong(file: Path, entry: str, value: Any, needed: str) -> CheckpointError:
    return damaged(file, f"has {entry} = {reprlib.repr(value)}: {needed} is needed")


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{file} can't be read: {error.strerror}; name a directory like "
        f"run/checkpoints/step-00001000, with {INDEX}, {MODEL} and {TRAINER} in it"
    )
