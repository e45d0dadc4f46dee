"""Log a run's numbers to ``metrics.jsonl``, TensorBoard and, on request, W&B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Append-only log of a run.

    Args:
        run_dir: the run's folder, for ``metrics.jsonl`` and ``tensorboard/``.
        first_step: lines after this step are dropped: a resumed run writes them again.
        wandb_project: also log to Weights & Biases, under the name of ``run_dir``.
        config: settings to show in W&B.

    Raises:
        RuntimeError: ``wandb_project`` is given, but wandb is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        # Imported here: TensorBoard takes a second to import, and evaluation does not need it.
        from torch.utils.tensorboard import SummaryWriter

        self._wandb = _start_wandb(wandb_project, run_dir.name, config) if wandb_project else None
        path, rewritten = run_dir / METRICS_FILE, run_dir / f".{METRICS_FILE}"
        earlier = [line for line in read_metrics(path) if line["step"] <= first_step]
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in earlier))
        rewritten.replace(path)  # atomically: a kill loses no line
        self._file = path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log numbers, and lists of numbers by position, after ``step`` completed steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        scalars = {name: v for name, v in values.items() if isinstance(v, (int, float))}
        for name, by_position in values.items():
            if isinstance(by_position, dict):
                for key, errors in by_position.items():
                    scalars[f"{name}/{key}_loops/mean"] = sum(errors) / len(errors)
                    scalars[f"{name}/{key}_loops/last_position"] = errors[-1]
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, name: str, config: dict[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(
            "--wandb needs the wandb package: pip install 'looped_fast[wandb]'"
        ) from error
    return wandb.init(project=project, name=name, id=name, resume="allow", config=config)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``; none if there is no file.

    Reading stops at a line that a kill cut short.
    """
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
