"""Find trained models: shipped ones by name, others by their folder or by a name on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from looped_fast.compat import load_official_checkpoint
from looped_fast.config import ModelConfig
from looped_fast.errors import CheckpointError, check_name, unknown_name
from looped_fast.model import LoopedTransformer
from looped_fast.pretrained import hub
from looped_fast.pretrained.saved import build, is_saved, load_saved
from looped_fast.training import checkpoint
from looped_fast.training.config import TrainConfig, saved_config, saved_model_config
from looped_fast.training.step import Start
from looped_fast.training.trm.config import is_trm

T = TypeVar("T")

_FOLDER = Path(__file__).parent
_FOLDERS = "the folder of a run, such as runs/lr-looped-tiny-..., or of one of its checkpoints"


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


def from_pretrained(
    source: str | Path, backend: str = "auto", *, revision: str | None = None
) -> LoopedTransformer:
    """A trained model on the CPU, in float32 unless ``save_pretrained`` wrote another dtype.

    Nothing but tensors and JSON is read, and no code is imported: not even that of a task of
    one's own, which a run may have been trained on.

    >>> model = from_pretrained("lr-small")
    >>> model.config.n_dims, model.config.n_loops
    (5, 12)

    Args:
        source: a folder that ``save_pretrained`` wrote, that of a run, whose newest checkpoint is
            taken, or that of a checkpoint; or one of ``pretrained.names()``, such as ``lr-small``
            or ``lr-standard-small``, of which ``train_config(name)`` says the task; or the
            ``owner/name`` of a model on the Hugging Face hub. A folder goes first.
        backend: as in ``LoopedTransformer``.
        revision: branch, tag or commit on the hub; the newest by default.

    Raises:
        ValueError: ``source`` is nothing of the kind; the message suggests the nearest name. Or a
            ``revision`` of something that is not on the hub, a classifier of tabular sets, or a
            Tiny Recursive Model (``pretrained.load_trm_run``).
        FileNotFoundError: a folder without a model, or a model that the hub does not have.
        CheckpointError: files are damaged, or of another model.
        RuntimeError: huggingface_hub is needed, and not installed.
        OSError: the hub can't be reached.
    """
    folder = Path(source)
    if not folder.exists():
        if str(source) in names():
            folder = path(str(source))
        elif hub.is_id(source):
            folder = hub.download(str(source), revision)
            revision = None
        else:
            unknown = unknown_name("pretrained model", str(source), names())
            raise ValueError(
                f"{unknown}; or give {_FOLDERS}, or owner/name on the Hugging Face hub"
            )
    if revision is not None:
        raise ValueError(
            f"revision = {revision!r} is of a model on the Hugging Face hub, and {source} is here"
        )
    if is_saved(folder):
        return load_saved(folder, backend)
    loaded = read_newest(folder, checkpoint.load)
    refuse_others(source, loaded)
    return build_checkpoint(saved_model_config(loaded), loaded, backend)


def build_checkpoint(
    config: ModelConfig, loaded: checkpoint.Checkpoint, backend: str = "auto"
) -> LoopedTransformer:
    """Make the model of a checkpoint, on the CPU. Raises CheckpointError as ``build``."""
    remedy = f"{loaded.path / checkpoint.INDEX} is damaged, or of another model: restore both"
    return build(config, loaded.model_state, loaded.path / checkpoint.MODEL, remedy, backend)


def refuse_others(source: str | Path, loaded: checkpoint.Checkpoint) -> None:
    """Raise ValueError for a model whose settings are of another kind; say what takes it."""
    if "held_out" in loaded.config:  # a setting of ``openml.TabularConfig``
        raise ValueError(
            f"{source} is a classifier of tabular sets; python -m looped_fast.openml evaluates it"
        )
    if is_trm(loaded.config):
        raise ValueError(
            f"{source} is a Tiny Recursive Model, which looped_fast.pretrained.load_trm_run loads, "
            f"and python -m looped_fast.evaluate evaluates"
        )


def checkpoint_label(source: str | Path, path: Path) -> str:
    """A name for the checkpoint at ``path``, which ``read_newest`` found for ``source``.

    It is that of the run's folder or of the pretrained model, else ``<run>-<step>``.
    """
    if path != Path(source):
        return Path(source).resolve().name
    path = path.resolve()
    return f"{path.parents[1].name}-{path.name}"


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
        f"{source} {what}; give {_FOLDERS}, or a pretrained model: {', '.join(names())}"
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
        refuse_others(source, saved)
        return Start(saved.path, saved.model_state)
    official = load_official_checkpoint(path)
    step = 0 if official.train_step is None else official.train_step + 1
    return Start(path, official.model_state, official.optimizer_state, step)
