"""The report at the end of a run: a table against the baselines, and a plot of its errors."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from looped_fast.errors import pip_install

_WRITERS = {"plots": "matplotlib.figure", "TensorBoard events": "torch.utils.tensorboard"}
_left_out: set[str] = set()  # outputs that were said to be left out

logger = logging.getLogger(__name__)


def can_write(*outputs: str) -> bool:
    """True if the packages that write ``outputs``, which are optional, can be imported.

    What is left out for lack of them is logged with the remedy, once in a process.

    Args:
        outputs: ``plots``, ``TensorBoard events`` or both.
    """
    missing = {name: error for name in outputs if (error := _import_error(_WRITERS[name]))}
    if new := missing.keys() - _left_out:
        _left_out.update(new)
        reasons = ", ".join(f"{name} ({missing[name]})" for name in sorted(new))
        logger.warning("not written: %s; to have them, %s", reasons, pip_install("report"))
    return not missing


def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:  # TensorBoard raises TypeError under a protobuf that it can't use
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def error_table(errors: dict[str, Tensor]) -> str:
    """A table of ``errors`` (name -> error by position [n]), half-way and at the end.

    A mean over positions would say little: the error of least squares has no bound at as many
    examples as dimensions.
    """
    n = len(next(iter(errors.values())))
    rows = [(name, e[n // 2].item(), e[-1].item()) for name, e in errors.items()]
    headers = ["squared error / variance", f"after {n // 2} examples", f"after {n - 1}"]
    return tabulate(rows, headers, floatfmt=".4f")


def plot(path: Path, history: list[dict[str, Any]], errors: dict[str, Tensor], title: str) -> None:
    """Draw training error over steps, and error by in-context position, into ``path`` (PNG).

    Args:
        path: the file.
        history: lines of ``metrics.jsonl``.
        errors: name -> error by position [n], relative to predicting zero.
        title: heading of the figure.
    """
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    training = [line for line in history if "relative_error" in line]
    left.plot([x["step"] for x in training], [x["relative_error"] for x in training])
    left.set(xlabel="training step", ylabel="training error / zero predictor", yscale="log")
    for name, error in errors.items():
        style = "-" if name.endswith("loops") else "--"
        # An exact fit, such as least squares on linear data, has no place on a log axis.
        right.plot(range(len(error)), error.clamp(min=1e-5), style, label=name)
    right.set(xlabel="in-context examples", ylabel="squared error / variance", yscale="log")
    right.set_ylim(top=3)  # least squares may lie far above
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
