"""``LoopedTransformer.predict``: many queries against one prompt each, and loops until enough.

python -m benchmarks.prediction  # minutes; writes benchmarks/results/prediction.json and .md
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import provenance
from looped_fast import LoopedTransformer, ModelConfig, from_pretrained, pretrained
from looped_fast.model.adaptive import Snapshot, state_change
from looped_fast.ops.flops import loop_flops
from looped_fast.tasks import EVALUATION, Task, sample_batch

RESULTS = Path(__file__).parent / "results"
DEPTHS = (0, 1, 3, 5)  # of Anderson acceleration; 0 is plain iteration
CLOSE = 1.02  # an error of at most so many times another counts as the same
REST = 0.01  # of the targets' standard deviation: a smaller step ends a prompt's loop
SEED = 1717

# Shapes of the queries' model, with 40 examples: (D, heads).
SHAPES = {"small (D = 64)": (64, 4), "paper (D = 256)": (256, 8)}


def queries_rows(n_queries: int, n_loops: int, repeats: int) -> list[dict[str, Any]]:
    """Time ``n_queries`` queries on 40 examples, and a prompt for each query, in turns."""
    rows = []
    for shape, (n_embd, n_head) in SHAPES.items():
        config = ModelConfig(n_embd=n_embd, n_head=n_head, n_loops=n_loops, window=1)
        xs, ys, queries = torch.randn(1, 40, 20), torch.randn(1, 40), torch.randn(1, n_queries, 20)
        points = torch.cat((xs.expand(n_queries, -1, -1), queries[0, :, None]), 1)
        values = torch.cat((ys.expand(n_queries, -1), torch.zeros(n_queries, 1)), 1)
        for backend in ("cpu", "reference"):
            model = LoopedTransformer(config, backend)

            def shared(model=model, xs=xs, ys=ys, queries=queries) -> Tensor:
                return model.predict(xs, ys, queries)[0]

            def each(model=model, points=points, values=values) -> Tensor:
                chunks = zip(points.split(50), values.split(50), strict=True)
                return torch.cat([model.predict(x, y)[:, -1] for x, y in chunks])

            torch.testing.assert_close(shared(), each(), rtol=1e-3, atol=1e-4)
            seconds = _in_turns([shared, each], repeats)
            flops = loop_flops(1, 80 + n_queries, n_embd, 1, n_loops, keys=80)
            rows.append(
                {
                    "shape": shape,
                    "backend": backend,
                    "shared_ms": 1e3 * seconds[0],
                    "each_ms": 1e3 * seconds[1],
                    "times_faster": seconds[1] / seconds[0],
                    "share_of_peak": flops / seconds[0] / _peak(),
                }
            )
            print(rows[-1], flush=True)
    return rows


def steps_rows(n_loops: int, repeats: int) -> list[dict[str, Any]]:
    """Time the same number of steps as one op, stopped by the engine, one by one, accelerated."""
    rows = []
    for shape, (n_embd, n_head) in SHAPES.items():
        model = LoopedTransformer(
            ModelConfig(n_embd=n_embd, n_head=n_head, n_loops=n_loops, window=1)
        )
        for batch in (1, 64):
            xs, ys = torch.randn(batch, 40, 20), torch.randn(batch, 40)
            ways: dict[str, dict[str, Any]] = {
                "one_op": {},
                "engine_stops": {"tolerance": 0},
                "own_criterion": {"tolerance": 0, "criterion": state_change},
                "anderson_1": {"anderson": 1},
                "anderson_5": {"anderson": 5},
            }
            calls = [functools.partial(model.predict, xs, ys, **way) for way in ways.values()]
            seconds = _in_turns(calls, repeats)
            times = {f"{name}_ms": 1e3 * s for name, s in zip(ways, seconds, strict=True)}
            rows.append({"shape": shape, "prompts": batch, **times})
            print(rows[-1], flush=True)
    return rows


def _in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seconds in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def _peak() -> float:
    """Operations a second of ``torch.mm`` at its best of three sizes."""
    speeds = []
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        speeds.append(2 * n**3 / _in_turns([lambda a=a, b=b: a @ b], 20)[0])
    return max(speeds)


def steps_errors(model: LoopedTransformer, xs: Tensor, ys: Tensor, n: int, depth: int) -> Tensor:
    """Squared error at the last position after steps 1 .. n: [n]."""
    outputs: list[Tensor] = []

    def record(now: Snapshot, before: Snapshot) -> Tensor:
        if not outputs:
            outputs.append(before.outputs[:, -1, 0])
        outputs.append(now.outputs[:, -1, 0])
        return torch.ones(len(xs))

    model.predict(xs, ys, tolerance=0, max_loops=n, anderson=depth, criterion=record)
    return torch.stack([(output - ys[:, -1]).square().mean() for output in outputs])


def loops_row(name: str, n_prompts: int, n_steps: int) -> dict[str, Any]:
    """How many loops a shipped model needs, by depth of the acceleration.

    ``to_trained_error`` counts loops until the error is that of the trained number of plain ones,
    or None if it never is. ``at_rest`` has the mean loops of prompts that stop when a step moves
    no prediction by ``REST`` of the targets' deviation, and the error of the last one there.
    """
    model, config = from_pretrained(name), pretrained.train_config(name)
    task: Task = config.make_task()
    xs, ys = sample_batch(task, n_prompts, config.n_points, seed=SEED, step=0, rank=EVALUATION)
    errors = {d: steps_errors(model, xs, ys, n_steps, d) / task.variance for d in DEPTHS}
    trained = errors[0][config.n_loops - 1].item()
    at_rest = {}
    for d in DEPTHS:
        tolerance = REST * task.variance**0.5
        predictions, n_loops = model.predict(
            xs, ys, tolerance=tolerance, max_loops=n_steps, anderson=d
        )
        error = (predictions[:, -1] - ys[:, -1]).square().mean() / task.variance
        at_rest[d] = {"loops": n_loops.double().mean().item(), "error": error.item()}
    row: dict[str, Any] = {
        "model": name,
        "trained_loops": config.n_loops,
        "error_at_trained": trained,
        "to_trained_error": {d: _first(errors[d] <= CLOSE * trained) for d in DEPTHS},
        "at_rest": at_rest,
    }
    print(row, flush=True)
    return row


def _first(reached: Tensor) -> int | None:
    steps = reached.nonzero()
    return int(steps[0]) + 1 if len(steps) else None


def markdown(results: dict[str, Any]) -> str:
    """The tables that docs/queries.md and docs/adaptive.md show."""
    lines = [
        "| model | backend | one pass | one prompt each | times faster | share of `torch.mm` |",
        "|---|---|---|---|---|---|",
    ]
    for r in results["queries"]:
        lines.append(
            f"| {r['shape']} | `{r['backend']}` | {r['shared_ms']:.0f} ms | {r['each_ms']:.0f} ms "
            f"| {r['times_faster']:.0f} | {r['share_of_peak']:.0%} |"
        )
    lines += [
        "",
        "| model | prompts | one op | engine stops | own criterion | m = 1 | m = 5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results["steps"]:
        times = (f"{value:.1f} ms" for name, value in r.items() if name.endswith("_ms"))
        lines.append(f"| {r['shape']} | {r['prompts']} | {' | '.join(times)} |")
    depths = " | ".join("plain" if d == 0 else f"m = {d}" for d in DEPTHS)
    lines += [
        "",
        f"| model | b | error at b | loops to that error: {depths} |",
        "|---" * (3 + len(DEPTHS)) + "|",
    ]
    for r in results["loops"]:
        counts = " | ".join(_count(r["to_trained_error"][d]) for d in DEPTHS)
        lines.append(
            f"| `{r['model']}` | {r['trained_loops']} | {r['error_at_trained']:.4f} | {counts} |"
        )
    lines += [
        "",
        f"| model | loops at rest (and error): {depths} |",
        "|---" * (1 + len(DEPTHS)) + "|",
    ]
    for r in results["loops"]:
        rests = (r["at_rest"][d] for d in DEPTHS)
        cells = " | ".join(f"{rest['loops']:.1f} ({rest['error']:.4f})" for rest in rests)
        lines.append(f"| `{r['model']}` | {cells} |")
    return "\n".join(lines) + "\n"


def _count(loops: int | None) -> str:
    return "never" if loops is None else str(loops)


def main(args: list[str] | None = None) -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--loops", type=int, default=20, help="of the queries' model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(args)
    torch.manual_seed(SEED)
    looped = [n for n in pretrained.names() if pretrained.train_config(n).model == "looped"]
    results = {
        "provenance": provenance("benchmarks.prediction"),
        "n_steps": chosen.steps,
        "queries": queries_rows(chosen.queries, chosen.loops, chosen.repeats),
        "steps": steps_rows(chosen.loops, 5 * chosen.repeats),
        "loops": [loops_row(name, chosen.prompts, chosen.steps) for name in looped],
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    (chosen.out / "prediction.json").write_text(text + "\n", encoding="utf-8")
    (chosen.out / "prediction.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
