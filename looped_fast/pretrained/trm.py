"""Trained Tiny Recursive Models: a run's folder, or one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from looped_fast.errors import CheckpointError
from looped_fast.model import TinyRecursiveModel, TRMConfig
from looped_fast.pretrained.provenance import file_sha256
from looped_fast.pretrained.weights import checkpoint_label, read_newest
from looped_fast.training import checkpoint
from looped_fast.training.checkpoint_check import check_weights
from looped_fast.training.distributed import resolve_device
from looped_fast.training.trm.config import TRMTrainConfig, is_trm, saved_trm_config


@dataclass(frozen=True)
class TRMRun:
    """A trained Tiny Recursive Model and its run; the puzzles are ``config.make_task()``.

    Attributes:
        name: for legends and file names.
        path: what was loaded.
        sha256: hash of the weights file.
        step: training steps finished.
        config: the run's settings.
        model: with the averaged weights, in evaluation mode.
    """

    name: str
    path: Path
    sha256: str
    step: int
    config: TRMTrainConfig
    model: TinyRecursiveModel

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.H_init.device


def load_trm_run(source: str | Path, device: str = "auto", backend: str = "auto") -> TRMRun:
    """Load the newest checkpoint of a run of ``train --model trm``, or one checkpoint.

    Raises:
        FileNotFoundError: ``source`` is neither.
        CheckpointError: the checkpoint is damaged.
        ValueError: it is of another model, or a device that can't be used.
    """
    loaded, sha256 = read_newest(source, lambda path: (checkpoint.load(path), file_sha256(path)))
    index = loaded.path / checkpoint.INDEX
    if not is_trm(loaded.config):
        raise ValueError(f"{source} is of no model trm; looped_fast.pretrained.load_run loads it")
    config = saved_trm_config(loaded)
    try:
        model = TinyRecursiveModel(TRMConfig.from_dict(loaded.meta["model"]), backend)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{index} has a wrong entry meta.model ({error!r}); restore it from a copy"
        ) from error
    check_weights(
        loaded.path / checkpoint.MODEL, loaded.model_state, model,
        f"{index} is damaged, or of another model: restore both",
    )  # fmt: skip
    model.load_state_dict(loaded.model_state)
    return TRMRun(
        name=checkpoint_label(source, loaded.path),
        path=loaded.path,
        sha256=sha256,
        step=loaded.step,
        config=config,
        model=model.to(resolve_device(device)).eval(),
    )
