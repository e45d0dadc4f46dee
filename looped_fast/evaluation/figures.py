"""Figures of an evaluation, in the manner of the official notebooks (``Figures_*.ipynb``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from looped_fast.evaluation import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Loops after which the official notebooks read a looped model at every position: published looped
# values are after that many, not after the b of training. Source: ``T`` of Figures_*.ipynb, whose
# ``eval_looped_model(model, xs, ys, loop_max=T)`` keeps the last prediction.
OFFICIAL_LOOPS = {"lr": 500, "sparse_lr": 500, "dt": 200, "relu_2nn": 500}
FORMATS = ("png", "pdf")
_TOP = 1.25  # upper limit of linear error axes
_OFFICIAL_TOPS = {"dt": 1.6}  # where the official figure has another
_PANELS = 6  # panels in a row of the grid


def position_figure(curves: Mapping[str, Curve], title: str, top: float = _TOP) -> Figure:
    """Squared error over the number of in-context examples; predicting zero is the dashed line."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    _draw_positions(axes, curves, top)
    axes.set_title(title)
    figure.legend(loc="outside right center")
    return figure


def loop_figure(
    curves: Mapping[str, Curve],
    loop_counts: Sequence[int],
    trained: Mapping[str, int],
    title: str,
) -> Figure:
    """Squared error at the last position over loop steps; dotted lines are the trained b."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), _colors(len(curves)), strict=True):
        axes.plot(loop_counts, curve.mean, color=color, lw=2, label=name)
        axes.fill_between(loop_counts, curve.low, curve.high, color=color, alpha=0.3, lw=0)
        axes.axvline(trained[name], color=color, ls=":")
    axes.axhline(1, color="k", ls="--")
    axes.set(xscale="log", yscale="log", xlabel="loop iterations", ylabel="squared error")
    axes.set_title(title)
    figure.legend(loc="outside right center")
    return figure


def shift_figure(
    panels: Mapping[str, Mapping[str, Curve]], title: str, top: float = _TOP
) -> Figure:
    """A grid with one panel of curves for each shift."""
    n_rows = -(-len(panels) // _PANELS)
    figure = _figure(3.2 * _PANELS, 2.6 * n_rows)
    grid = figure.subplots(n_rows, _PANELS, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        _draw_positions(axes, curves, top)
        axes.set_title("in distribution" if name == "none" else name, fontsize="medium")
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` with each suffix of ``FORMATS``; the same figure gives the same bytes."""
    paths = [path.with_suffix(f".{kind}") for kind in FORMATS]
    for file in paths:
        undated: dict[str, Any] = {"CreationDate": None} if file.suffix == ".pdf" else {}
        figure.savefig(file, dpi=120, metadata=undated)
    return paths


def axis_top(task: str) -> float:
    """Upper limit of linear error axes of the task of that name, as in its official figure."""
    return _OFFICIAL_TOPS.get(task, _TOP)


def _draw_positions(axes: Axes, curves: Mapping[str, Curve], top: float) -> None:
    for (name, curve), color in zip(curves.items(), _colors(len(curves)), strict=True):
        axes.plot(curve.mean, color=color, lw=2, label=name)
        positions = range(len(curve.mean))
        axes.fill_between(positions, curve.low, curve.high, color=color, alpha=0.3, lw=0)
    axes.axhline(1, color="k", ls="--")
    axes.set_ylim(-0.1, top)
    axes.set(xlabel="in-context examples", ylabel="squared error")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    return Figure(figsize=(width, height), layout="constrained")


def _colors(n: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["coolwarm"](np.linspace(0, 1, n))
