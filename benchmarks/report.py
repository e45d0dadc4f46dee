"""Measurements as tables, a page and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.cases import ALL_CASES, CONTENDERS

Row = dict[str, Any]  # what benchmarks.measure prints, one per case, mode and contender
HEADERS = (
    "contender", "ms", "x eager fp32", "x best opponent", "GFLOP/s", "% of peak", "MB added",
    "launches", "threads", "runs", "compile s",
)  # fmt: skip


def add_ratios(rows: list[Row], peak: dict[str, float]) -> None:
    """Add to each row its share of the peak, and its speed against opponents (None if absent).

    ``best_opponent_ratio`` is against the fastest opponent at the same precision.
    """
    for row in rows:
        contender = CONTENDERS[row["contender"]]
        others = [r for r in rows if (r["case"], r["mode"]) == (row["case"], row["mode"])]
        eager = [r["ms"] for r in others if r["contender"] == "eager fp32"]
        opponents = [
            r["ms"]
            for r in others
            if not CONTENDERS[r["contender"]].is_engine
            and CONTENDERS[r["contender"]].precision == contender.precision
        ]
        row["share_of_peak"] = row["gflops"] / peak[contender.precision]
        row["eager_fp32_ratio"] = eager[0] / row["ms"] if eager else None
        row["best_opponent_ratio"] = min(opponents) / row["ms"] if opponents else None


def tables(rows: list[Row], style: str = "simple") -> str:
    """One table for each case and mode, in a ``style`` of tabulate."""
    parts = []
    for case, mode in dict.fromkeys((row["case"], row["mode"]) for row in rows):
        lines = [
            (r["contender"], r["ms"], r["eager_fp32_ratio"], r["best_opponent_ratio"], r["gflops"],
             100 * r["share_of_peak"], r["memory_mb"], r["launches"], r["threads"], r["repeats"],
             r["compile_s"])
            for r in rows if (r["case"], r["mode"]) == (case, mode)
        ]  # fmt: skip
        formats = ("", ".2f", ".2f", ".2f", ".0f", ".0f", ".0f", "", "", "", ".0f")
        parts.append(
            f"{case}, {mode}: {ALL_CASES[case].describe()}\n\n"
            + tabulate(lines, HEADERS, style, floatfmt=formats, missingval="-")
        )
    return "\n\n".join(parts)


def caption(result: dict[str, Any]) -> str:
    """The machine in one line, with the peak rates that shares refer to."""
    origin, peak = result["provenance"], result["peak_gflops"]
    machine = origin.get("gpu") or f"{origin['cpu']}, {origin['cores']} cores"
    return (
        f"{machine}, torch {origin['torch']}; "
        f"peak {peak['fp32']:.0f} (fp32) and {peak['bf16']:.0f} (bf16) GFLOP/s"
    )


def not_measured(result: dict[str, Any]) -> str:
    """A line for each contender that has no figure."""
    return "\n".join(
        f"not measured: {entry['case']}, {entry['mode']}, {entry['contender']}: {entry['reason']}"
        for entry in result["not_measured"]
    )


def markdown(result: dict[str, Any]) -> str:
    """The whole result as a page."""
    origin = "\n".join(f"- {name}: {value}" for name, value in result["provenance"].items())
    missing = "\n".join(f"- {line}" for line in not_measured(result).splitlines())
    parts = ["# Comparison", caption(result), origin, tables(result["rows"], "github"), missing]
    return "\n\n".join(part for part in parts if part) + "\n"


def chart(rows: list[Row], path: Path, caption: str) -> None:
    """Write bars of milliseconds, one panel for each case and mode, as PNG."""
    panels = list(dict.fromkeys((row["case"], row["mode"]) for row in rows))
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3 * height + 0.5))
    grid = figure.subplots(height, columns, squeeze=False)
    for axes, (case, mode) in zip(grid.flat, panels, strict=False):
        shown = [r for r in rows if (r["case"], r["mode"]) == (case, mode)]
        names = [r["contender"] for r in shown]
        colours = ["tab:orange" if CONTENDERS[name].is_engine else "tab:gray" for name in names]
        bars = axes.barh(names, [r["ms"] for r in shown], color=colours)
        axes.bar_label(bars, fmt=lambda ms: f"{ms:,.{0 if ms >= 100 else 1}f}", padding=2)
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.set(title=f"{case}, {mode}", xlabel="milliseconds (median)")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(caption, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
