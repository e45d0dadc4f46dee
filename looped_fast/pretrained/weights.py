"""Find shipped weights and checkpoints by name or path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from looped_fast.compat import load_official_checkpoint
from looped_fast.errors import CheckpointError, check_name
from looped_fast.model import LoopedTransformer
from looped_fast.training import checkpoint
from looped_fast.training.config import TrainConfig, saved_config
from looped_fast.training.step import Start

T = TypeVar("T")

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names that ``from_pretrained`` takes."""
    return sorted(index.parent.name for index in _FOLDER.glob(f"*/{checkpoint.INDEX}"))


def path(name: str) -> Path:
    """The folder of shipped weights, which ``looped_fast.train --init-from`` takes.

    Raises:
        ValueError: an unknown name; the message suggests the nearest valid one.
    """
    check_name("pretrained model", name, names())
    return _FOLDER / name


def train_config(name: str) -> TrainConfig:
    """Settings of the run that made the weights; ``.make_task()`` is the task learned.

    >>> config = train_config("lr-small")
    >>> config.make_task(), config.n_points
    (LinearRegression(n_dims=5), 16)

    Raises:
        ValueError: an unknown name; the message suggests the nearest valid one.
    """
    return saved_config(checkpoint.load(path(name)))


def from_pretrained(name: str, backend: str = "auto") -> LoopedTransformer:
    """A trained model, float32 on the CPU. ``train_config(name)`` says for which task.

    >>> model = from_pretrained("lr-small")
    >>> model.config.n_dims, model.config.n_loops
    (5, 12)

    Args:
        name: one of ``pretrained.names()``, such as ``lr-small`` or ``lr-standard-small``.
        backend: as in ``LoopedTransformer``.

    Raises:
        ValueError: an unknown name; the message suggests the nearest valid one.
        CheckpointError: the installed weights are damaged.
    """
    weights = checkpoint.load(path(name))
    config = saved_config(weights)
    model = LoopedTransformer(config.model_config(), backend)
    checkpoint.restore_into(weights, model)
    return model


def find_checkpoint(source: str | Path) -> Path:
    """Find a run's newest checkpoint, a checkpoint, or a shipped model; paths go first.

    Raises:
        FileNotFoundError: ``source`` is none of these.
    """
    folder = Path(source)
    if (folder / checkpoint.INDEX).exists():
        return folder
    latest = checkpoint.latest(folder)
    if latest is not None:
        return latest
    if not folder.exists() and str(source) in names():
        return path(str(source))
    what = "holds no checkpoint" if folder.exists() else "does not exist"
    raise FileNotFoundError(
        f"{source} {what}; give the folder of a run, such as runs/lr-looped-tiny-..., or of one "
        f"of its checkpoints, or a pretrained model: {', '.join(names())}"
    )


def read_newest(source: str | Path, read: Callable[[Path], T]) -> T:
    """Return ``read(path)`` for the path that ``find_checkpoint`` finds.

    A run that trains meanwhile may prune that checkpoint before it is read; the newest one is read
    instead.

    Raises:
        FileNotFoundError: ``source`` is nothing that ``find_checkpoint`` finds.
        CheckpointError, OSError: what ``read`` raises for a checkpoint that is still the newest.
    """
    path = find_checkpoint(source)
    while True:
        try:
            return read(path)
        except (CheckpointError, OSError):
            newest = find_checkpoint(source)
            if newest == path:
                raise
            path = newest


def load_start(source: str | Path) -> Start:
    """Load what a run with ``init_from = source`` starts from, for ``Trainer``.

    Args:
        source: whatever ``find_checkpoint`` takes, for its weights only; or an official
            ``.pt``, for its optimizer state and step too.

    Raises:
        FileNotFoundError: ``source`` is none of these.
        CheckpointError: the file is damaged, or not a checkpoint.
    """
    path = Path(source)
    if path.suffix != ".pt":
        saved = read_newest(path, checkpoint.load)
        return Start(saved.path, saved.model_state)
    official = load_official_checkpoint(path)
    step = 0 if official.train_step is None else official.train_step + 1
    return Start(path, official.model_state, official.optimizer_state, step)
