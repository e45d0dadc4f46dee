"""Models from saved files: every file is checked before a model takes memory for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from looped_fast.config import VERSION, ModelConfig
from looped_fast.errors import MOST_WEIGHTS, CheckpointError, read_file, read_json
from looped_fast.model import LoopedTransformer
from looped_fast.model.sharing import CONFIG, FORMAT_VERSION, WEIGHTS
from looped_fast.training.checkpoint_check import check_weights
from looped_fast.training.checkpoint_read import check_types, damaged, parse_weights

_ENTRIES = {"library_name": str, "looped_fast_version": str, "format_version": int, "model": dict}
_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def is_saved(folder: Path) -> bool:
    """True for a folder that ``save_pretrained`` wrote."""
    return (folder / CONFIG).exists()


def load_saved(folder: Path, backend: str = "auto") -> LoopedTransformer:
    """Load the model that ``save_pretrained`` wrote to ``folder``, on the CPU, in its dtype.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer format, or of another model.
    """
    config, file = _read_config(folder / CONFIG), folder / WEIGHTS
    try:
        content = read_file(file, MOST_WEIGHTS)
    except (OSError, ValueError) as error:
        raise damaged(file, f"can't be read: {error}") from None
    remedy = f"Save model and configuration together with save_pretrained; see {folder / CONFIG}"
    return build(config, parse_weights(file, content), file, remedy, backend)


def build(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    file: Path,
    remedy: str,
    backend: str = "auto",
) -> LoopedTransformer:
    """Make the model of ``config`` that holds the weights ``state``, without a copy of them.

    Args:
        config: what the weights' file is said to be of; any size, as it may be wrong.
        state: name -> tensor, all of one dtype.
        file: where the weights are from, for messages.
        remedy: what to do about weights of another model.
        backend: as in ``LoopedTransformer``.

    Raises:
        CheckpointError: the weights are not those of such a model, or hold NaN or Inf.
        ValueError: an unknown backend.
    """
    if config.n_layer > len(state):
        raise CheckpointError(
            f"{file} is of another model: it holds {len(state)} tensors, too few for n_layer = "
            f"{config.n_layer}. {remedy}"
        )
    try:
        with torch.device("meta"):
            model = LoopedTransformer(config, backend)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no tensor can have
        raise CheckpointError(f"{file} is of another model: {error}. {remedy}") from None
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) == 1 and dtypes <= _DTYPES:
        model.to(dtypes.pop())
    check_weights(file, state, model, remedy)
    model.load_state_dict(state, assign=True)
    return model


def _read_config(file: Path) -> ModelConfig:
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise damaged(file, f"can't be read: {error}") from None
    if found.get("library_name") != "looped_fast":
        raise CheckpointError(
            f"{file} is of no model of looped_fast; name a folder or repository that "
            f"save_pretrained or push_to_hub wrote. A model of other code is made by that code, "
            f"and looped_fast.accelerate(model) speeds it up"
        )
    check_types(file, found, {"format_version": int})
    version = found["format_version"]
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, written by looped_fast "
            f"{found.get('looped_fast_version')}; this is {VERSION}, which reads versions 1 to "
            f"{FORMAT_VERSION}; install a newer looped_fast"
        )
    check_types(file, found, _ENTRIES)
    for name in found:
        if name not in _ENTRIES:
            raise damaged(file, f"has an unknown entry {name!r}")
    try:
        return ModelConfig.from_dict(found["model"])
    except (ValueError, TypeError) as error:
        raise damaged(file, f"holds settings that can't be used: {error}") from None
