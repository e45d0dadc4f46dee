"""The figures on the page of results, drawn from the numbers of ``reproduce.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from looped_fast.evaluation import Curve, figures
from looped_fast.evaluation.figures import OFFICIAL_LOOPS
from looped_fast.paper import openml, published, state_probes, sweep
from looped_fast.paper.results_page import (
    Numbers,
    as_written,
    numbers_file,
    read_numbers,
    scale,
)


def draw(name: str, out: Path) -> None:
    """Draw the figures of ``<out>/results/<name>.json`` as PNG files beside it."""
    numbers = read_numbers(out, name)
    with as_written(numbers_file(out, name)):
        paths = list(_draw(name, numbers, out / "results"))
    for path in paths:
        _shrink(path)


def _draw(name: str, numbers: Numbers, folder: Path) -> Iterator[Path]:
    path = folder / f"{name}.png"
    if "positions" in numbers:
        _draw_task(path, name, numbers)
        yield path
    elif "shifts" in numbers:
        panels = {
            shift: {who: Curve(**curve) for who, curve in curves.items()}
            for shift, curves in numbers["shifts"].items()
        }
        title = "linear regression out of distribution"
        figures.shift_figure(panels, title).savefig(path, dpi=50)
        yield path
    elif "sweeps" in numbers:
        for label, result in numbers["sweeps"].items():
            title = f"{label}: {result['scale']}"
            path = folder / f"sweep-{label}.png"
            sweep.plot(path, result["runs"], title)
            yield path
    elif "runs" in numbers:
        state_probes.plot(path, numbers["runs"])
        yield path
    elif "experiments" in numbers:
        for label, result in numbers["experiments"].items():
            path = folder / f"openml-{label}.png"
            openml.plot(path, result["sets"])
            yield path


def _shrink(path: Path) -> None:
    """Rewrite a PNG with 64 colours: the repository keeps a third of the size."""
    from PIL import Image  # comes with matplotlib

    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def _draw_task(path: Path, task: str, numbers: Numbers) -> None:
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    panels: list[tuple[str, str, dict[str, Numbers]]] = []
    if task in published.CURVES:
        curves = {who: {"mean": mean} for who, mean in published.CURVES[task].items()}
        title = f"published, d = 20, looped {OFFICIAL_LOOPS[task]} times"
        panels.append((title, "in-context examples", curves))
    panels.append((f"here, {scale(numbers)}", "in-context examples", numbers["positions"]))
    if "loops" in numbers:
        panels.append(("here, at the last position", "loops", numbers["loops"]["curves"]))
    # A variant ("looped, 500 loops", "XGBoost, signs") is dashed, in its family's colour.
    families = list(dict.fromkeys(who.split(",")[0] for _, _, lines in panels for who in lines))
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (title, xlabel, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for who, curve in lines.items():
            first = 1 if xlabel == "loops" else 0
            xs = range(first, first + len(curve["mean"]))
            family, *variant = who.split(",")
            width = 2.5 if family in openml.MODELS else 1.2
            color, style = f"C{families.index(family)}", "--" if variant else "-"
            axes.plot(xs, curve["mean"], color=color, ls=style, lw=width, label=who)
            if "low" in curve:
                axes.fill_between(xs, curve["low"], curve["high"], color=color, alpha=0.3, lw=0)
        axes.set(title=title, xlabel=xlabel, ylabel="squared error / variance")
        axes.grid(alpha=0.3)
        if xlabel == "loops":
            axes.set(xscale="log", yscale="log")
            axes.axvline(numbers["key"]["models"]["looped"]["n_loops"], color="k", linestyle=":")
        else:
            axes.set_ylim(0, 1.6)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=80)
