"""Trained models by name: a run's folder, one of its checkpoints, or a model shipped with us."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from looped_fast.model import LoopedTransformer
from looped_fast.pretrained.provenance import file_sha256
from looped_fast.pretrained.weights import (
    build_checkpoint,
    checkpoint_label,
    read_newest,
    refuse_others,
)
from looped_fast.tasks import Task
from looped_fast.training import checkpoint
from looped_fast.training.config import TrainConfig, saved_config
from looped_fast.training.distributed import resolve_device


@dataclass(frozen=True)
class Run:
    """A trained model and what it was trained on.

    Attributes:
        name: for legends and file names.
        path: what was loaded.
        sha256: hash of the weights file.
        step: training steps finished.
        config: the run's settings.
        task: the task that it was trained on.
        model: with the trained weights, in evaluation mode.
    """

    name: str
    path: Path
    sha256: str
    step: int
    config: TrainConfig
    task: Task
    model: LoopedTransformer

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device


def load_run(source: str | Path, device: str = "auto") -> Run:
    """Load the newest checkpoint of a run's folder, one checkpoint, or a shipped model.

    Raises:
        FileNotFoundError: ``source`` is none of these.
        CheckpointError: the checkpoint is damaged or of another model.
        ValueError: a classifier of tabular sets, a Tiny Recursive Model, a device that can't be
            used, or a task in a module that is not imported (``tasks.allow_task_import``).
    """
    loaded, sha256 = read_newest(source, lambda path: (checkpoint.load(path), file_sha256(path)))
    path = loaded.path
    refuse_others(source, loaded)
    config = saved_config(loaded)
    model = build_checkpoint(config.model_config(), loaded)
    return Run(
        name=checkpoint_label(source, path),
        path=path,
        sha256=sha256,
        step=loaded.step,
        config=config,
        task=config.make_task(),
        model=model.to(resolve_device(device)).eval(),
    )
