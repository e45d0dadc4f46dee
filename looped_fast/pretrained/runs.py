"""Trained models by name: a run's folder, one of its checkpoints, or a model shipped with us."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from looped_fast.model import LoopedTransformer
from looped_fast.pretrained.provenance import file_sha256
from looped_fast.pretrained.weights import read_newest
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
        ValueError: a classifier of tabular sets, a device that can't be used, or a task in a
            module that is not imported (``tasks.allow_task_import``).
    """
    loaded, sha256 = read_newest(source, lambda path: (checkpoint.load(path), file_sha256(path)))
    path = loaded.path
    if "held_out" in loaded.config:  # a setting of ``openml.TabularConfig``
        raise ValueError(
            f"{source} is a classifier of tabular sets; python -m looped_fast.openml evaluates it"
        )
    config = saved_config(loaded)
    model = LoopedTransformer(config.model_config())
    checkpoint.restore_into(loaded, model)
    is_named = path != Path(source)  # by its run's folder, or as a pretrained model
    return Run(
        name=Path(source).resolve().name if is_named else _checkpoint_name(path.resolve()),
        path=path,
        sha256=sha256,
        step=loaded.step,
        config=config,
        task=config.make_task(),
        model=model.to(resolve_device(device)).eval(),
    )


def _checkpoint_name(path: Path) -> str:
    """``<run>-<step>`` of ``<run>/checkpoints/<step>``."""
    return f"{path.parents[1].name}-{path.name}"
