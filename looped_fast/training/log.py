"""Log a run's numbers to ``metrics.jsonl``, TensorBoard and, on request, W&B."""

from __future__ import annotations

import json
import logging
import os
import reprlib
from pathlib import Path
from typing import Any

from looped_fast.errors import needs_extra, read_file
from looped_fast.evaluation.report import can_write
from looped_fast.training.durable import when_free, write_durably

METRICS_FILE = "metrics.jsonl"
_MAX_BYTES = 2**32

logger = logging.getLogger(__name__)


class MetricsLog:
    """Append-only log of a run. Without TensorBoard its events are left out, with a warning.

    Args:
        run_dir: the run's folder, for ``metrics.jsonl`` and ``tensorboard/``.
        first_step: lines after this step are dropped: a resumed run writes them again.
        wandb_project: also log to Weights & Biases, under the name of ``run_dir``.
        config: settings to show in W&B.

    Raises:
        RuntimeError: ``wandb_project`` is given, but wandb is not installed; or a line of
            ``metrics.jsonl`` is damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._wandb = _start_wandb(wandb_project, run_dir.name, config) if wandb_project else None
        path, rewritten = run_dir / METRICS_FILE, run_dir / f".{METRICS_FILE}"
        earlier = [text for text, line in _read_lines(path) if line["step"] <= first_step]
        write_durably(rewritten, b"".join(text + b"\n" for text in earlier))
        when_free(os.replace, rewritten, path)  # atomically: a kill loses no line
        self._file = path.open("ab", buffering=0)  # after an error, nothing is left for close()
        self._path, self._made = path, path.stat()
        self._tensorboard = _open_tensorboard(run_dir / "tensorboard", first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log numbers, and lists of numbers by position, after ``step`` completed steps.

        Raises:
            OSError: the disk is full, say, or as in ``check_folder``.
        """
        self.check_folder()
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(
                f"can't write step {step} to {self._path}: {error.strerror}; free space, and "
                f"continue with --resume"
            ) from error
        scalars = {name: v for name, v in values.items() if isinstance(v, (int, float))}
        for name, by_position in values.items():
            if isinstance(by_position, dict):
                for key, errors in by_position.items():
                    scalars[f"{name}/{key}_loops/mean"] = sum(errors) / len(errors)
                    scalars[f"{name}/{key}_loops/last_position"] = errors[-1]
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()  # its thread must not meet a folder that is removed later
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def check_folder(self) -> None:
        """Raise OSError if the run's folder was removed or moved: nobody would find its files."""
        try:
            is_there = os.path.samestat(self._made, self._path.stat())
        except OSError:
            is_there = False
        if not is_there:
            raise OSError(
                f"{self._path.parent} was removed or moved while the run was training; if its "
                f"checkpoints were kept, continue with --resume"
            )

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except OSError as error:
                logger.warning("TensorBoard's events are incomplete: %s", error)
        if self._wandb is not None:
            self._wandb.finish()


def _open_tensorboard(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer, or None without TensorBoard, which is logged."""
    if not can_write("TensorBoard events"):
        return None
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    writer = SummaryWriter(str(folder), purge_step=purge_step)
    writer.flush()
    return writer


def _start_wandb(project: str, name: str, config: dict[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise needs_extra("--wandb needs", "wandb", "wandb") from error
    return wandb.init(project=project, name=name, id=name, resume="allow", config=config)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``; none if there is no file.

    A last line that a kill cut short is left out, which is logged as a warning.

    Raises:
        RuntimeError: another line is damaged; the message names file and line.
        ValueError: it is no regular file, or one of more than 4 GiB.
    """
    return [line for _, line in _read_lines(path)]


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines of ``metrics.jsonl`` as written, without line breaks, and what each holds."""
    if not path.exists():
        return []
    texts = read_file(path, _MAX_BYTES).split(b"\n")
    numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    lines = []
    for number, text in numbered:
        try:
            line = json.loads(text.decode())
            if not (isinstance(line, dict) and type(line.get("step")) is int and line["step"] >= 0):
                raise ValueError("no mapping with a step of 0 or more")
        except (ValueError, RecursionError) as error:
            if number == numbered[-1][0]:
                logger.warning(
                    "%s, line %d: dropped, since the last line is damaged: %s",
                    path, number, reprlib.repr(text),
                )  # fmt: skip
                break
            raise RuntimeError(
                f"{path}, line {number} is damaged ({error}): {reprlib.repr(text)}; delete this "
                f"line, or move the file away"
            ) from None
        lines.append((text, line))
    return lines
