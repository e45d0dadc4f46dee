"""Time every baseline for one figure, and the loop over prompts and positions.

    python -m benchmarks.baselines --prompts 1280 --points 101

The loop, on one thread, is timed on a sample (every tenth position of two prompts) and scaled to
all fits; ours, on all cores, is scaled to 1280 prompts if it ran fewer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.baseline_loops import LOOPS, one_by_one
from benchmarks.provenance import provenance
from looped_fast.evaluation.baselines import BASELINES
from looped_fast.tasks import Batch, Task, make_task, sample_batch
from looped_fast.training.command_line import Parser

_FIGURE_PROMPTS = 1280
_TASKS = {"lasso": "sparse_lr", "2-layer network": "relu_2nn"}  # of their figures
HEADERS = ("baseline", "s", "s for 1280 prompts", "loop, s for 1280 prompts", "ratio")


def main() -> None:
    """Print a table; write it with its provenance if ``--out`` is given."""
    parser = Parser("python -m benchmarks.baselines", description=__doc__)
    parser.add_argument("--prompts", type=int, default=_FIGURE_PROMPTS)
    parser.add_argument("--points", type=int, default=101)
    parser.add_argument("--dims", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        rows.append(measure(name, options.prompts, options.points, options.dims))
        print(f"{name}: {rows[-1]['measured_s']:.1f} s", flush=True)
    print(f"\n{options.prompts} prompts, {options.points} points, d = {options.dims}\n")
    print(tabulate([row.values() for row in rows], HEADERS, floatfmt=".3g"))
    trees = sum(row["figure_s"] for row in rows if row["baseline"].startswith("XGBoost"))
    total = sum(row["figure_s"] for row in rows)
    print(f"\nall, for 1280 prompts: {total:.0f} s; without XGBoost {total - trees:.0f} s")
    if options.out:
        origin = provenance("benchmarks.baselines")
        size = {"prompts": options.prompts, "points": options.points, "dims": options.dims}
        document = {"provenance": origin, **size, "rows": rows}
        options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")


def measure(name: str, n_prompts: int, n_points: int, n_dims: int) -> dict[str, Any]:
    """Time ours and the loop, and check that they agree."""
    prompts = figure_prompts(name, n_prompts, n_points, n_dims)
    predict = BASELINES[name]
    warm_up(name, prompts)
    predictions, seconds = timed(lambda: predict(*prompts))
    sample = Batch(prompts.xs[:2], prompts.ys[:2])
    positions = range(1, n_points, max(1, n_points // 10))
    expected, loop_seconds = timed(lambda: one_by_one(LOOPS[name], *sample, positions))
    if name != "2-layer network":  # its weights and minibatches are random
        check(name, predictions[:2], expected, positions)
    fits = len(sample.xs) * len(positions)
    scale = _FIGURE_PROMPTS * (n_points - 1) / fits
    figure_s, loop_s = seconds * _FIGURE_PROMPTS / n_prompts, loop_seconds * scale
    return {
        "baseline": name,
        "measured_s": seconds,
        "figure_s": figure_s,
        "loop_s": loop_s,
        "ratio": loop_s / figure_s,
    }


def figure_prompts(name: str, n_prompts: int, n_points: int, n_dims: int) -> Batch:
    """Prompts of the task whose figure shows the baseline."""
    trees = "tree" in name or "XGBoost" in name
    task: Task = make_task("dt" if trees else _TASKS.get(name, "lr"), n_dims)
    return sample_batch(task, n_prompts, n_points, seed=0, step=0)


def warm_up(name: str, prompts: Batch) -> None:
    """Import and start worker processes before timing; the network's start within its minutes."""
    shared = "tree" in name or "XGBoost" in name or name == "lasso"
    few = math.ceil(2000 / prompts.ys.shape[1]) if shared else 2
    BASELINES[name](prompts.xs[:few], prompts.ys[:few])
    one_by_one(LOOPS[name], prompts.xs[:1], prompts.ys[:1], [1])


def timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Result of ``run``, and its wall time in seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def check(name: str, predictions: torch.Tensor, expected: torch.Tensor, positions: range) -> None:
    """Raise if predictions differ by more than scikit-learn's lasso does, with its tolerance."""
    columns = list(positions)
    error = (predictions.double() - expected)[:, columns].abs().median()
    if not error <= 1e-3 * expected[:, columns].abs().max():
        raise AssertionError(f"{name} differs from the loop over prompts by {error}")


if __name__ == "__main__":
    main()
