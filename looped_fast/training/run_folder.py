"""The folder of a run: find it to resume, make and lock it, write its settings."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import yaml

from looped_fast.training import checkpoint, lock
from looped_fast.training.log import METRICS_FILE
from looped_fast.training.task_settings import flat

CONFIG_FILE = "config.yaml"


def load_latest(run_dir: Path) -> checkpoint.Checkpoint:
    """Load the newest checkpoint of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        CheckpointError: the newest checkpoint is damaged.
    """
    latest = checkpoint.latest(run_dir)
    run = run_dir.resolve().parent.parent
    if latest is None and checkpoint.latest(run) is not None:
        raise FileNotFoundError(f"{run_dir} is one checkpoint; give its run: --resume {run}")
    if latest is None:
        raise FileNotFoundError(
            f"{run_dir} holds no checkpoint to resume; give the folder of a run, "
            f"such as runs/lr-looped-tiny-..."
        )
    return checkpoint.load(latest)


def make_run_dir(label: str, out: str | None, held: contextlib.ExitStack) -> Path:
    """Make and lock the folder of a new run: ``out``, or ``runs/<label>-<time>``.

    Files of a run that did not finish a step do not stand in the way.
    When ``held`` closes, the lock ends, and a folder that was made here and is empty is removed.

    Raises:
        ValueError: the folder already holds a run.
        InUseError: another process writes to it.
        OSError: the folder can't be made.
    """
    try:
        run_dir = _new_folder(label) if out is None else Path(out)
        if out is None or not run_dir.exists():
            held.callback(_remove_if_empty, run_dir)
        held.enter_context(lock.hold(run_dir))
        saved = checkpoint.latest(run_dir) is not None
        metrics = run_dir / METRICS_FILE
        if saved or (metrics.exists() and metrics.stat().st_size):
            remedy = (
                f"continue it with --resume {run_dir}" if saved else "it saved nothing: delete it"
            )
            raise ValueError(f"{run_dir} already holds a run; {remedy}, or choose another --out")
        return run_dir
    except OSError as error:
        raise _cannot_write(error) from error


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # raised if it is not empty
        folder.rmdir()


def _new_folder(label: str) -> Path:
    """Make a new folder; runs that start within the same second get different ones."""
    stem = f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir, tried = Path("runs") / stem, 1
    while True:
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            tried += 1
            run_dir = run_dir.with_name(f"{stem}-{tried}")
        else:
            return run_dir


def _cannot_write(error: OSError) -> OSError:
    return OSError(
        f"can't write to {error.filename}: {error.strerror}; choose another folder with --out"
    )


def write_config(settings: dict[str, Any], run_dir: Path) -> None:
    """Write settings as YAML. Raises OSError with a remedy."""
    try:
        text = yaml.safe_dump(settings, sort_keys=False)
        (run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(error) from error


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """``name old -> new`` for each setting that differs."""
    before, after = flat(before), flat(after)
    names = dict.fromkeys([*before, *after])
    return [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def check_resume(
    run_dir: Path, saved: checkpoint.Checkpoint, before: Any, settings: Any, file: Path | None
) -> None:
    """Raise ValueError for changed settings that a resumed run must keep.

    Args:
        run_dir: the run's folder.
        saved: its checkpoint.
        before: settings of the run until now.
        settings: those that it is to continue with.
        file: what ``--config`` names.
    """
    if file is not None:
        raise ValueError(
            f"--config {file}: a resumed run keeps its own settings; change single ones with flags"
        )
    for name in ("preset", "out", "init_from"):
        value = getattr(settings, name, None)
        if value != getattr(before, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is for a new run; leave it out, or --resume"
            )
    if settings.steps < saved.step:
        raise ValueError(
            f"--steps {settings.steps}: {run_dir} is at step {saved.step} already; give "
            f"more steps, or train a shorter run in a new --out"
        )
