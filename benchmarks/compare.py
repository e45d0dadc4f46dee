"""Compare the engine with plain PyTorch: ``python -m benchmarks.compare --device cpu``.

Measures time, rate and memory of a training step and of inference at the sizes of the paper, and of
the Tiny Recursive Model on Sudoku, for eager PyTorch, torch.compile and the engine, in fp32 and
bf16; on a GPU (``--device cuda``) with and without CUDA graphs, for each provider of attention, and
the launches, too. Each is timed only if its numbers are right; on a CPU in a process of its own, at
its best thread setting. Prints tables, and writes Markdown, JSON and a chart. A full run may take
hours on two cores, most of it spent on compiling whole models; ``--quick`` takes a
minute or two. On a GPU all contenders but whole compiled models share a process, and ``--budget``
limits the time of everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cases import ALL_CASES, CONTENDERS, Case, Contender, PuzzleCase, modes
from benchmarks.processes import ROOT, Measuring
from benchmarks.provenance import provenance
from benchmarks.workload import model_of
from looped_fast import explain_backend
from looped_fast.training.command_line import Parser

TIMEOUT_S = 1800  # for one contender in one mode of one case


Job = tuple[str, str, str]  # case, mode, contender


def measure_jobs(
    jobs: Sequence[Job], settings: Sequence[str], timeout: float, end: float
) -> Iterator[dict[str, Any]]:
    """Measure ``jobs`` one after another in a process: a row for each, or one with a ``reason``.

    A process that fails or takes more than ``timeout`` seconds for a job is replaced by another one
    for the jobs after it. Nothing is started after ``end`` (``time.monotonic``).
    """
    left = deque(jobs)
    while left and time.monotonic() < end:
        names = [f"{case} {mode}: {contender}" for case, mode, contender in left]
        with Measuring([*names, *settings]) as process:
            while left and (seconds := end - time.monotonic()) > 0:
                case, mode, contender = left.popleft()
                print(f"measuring {case} {mode}: {contender}", file=sys.stderr, flush=True)
                try:
                    yield process.next(min(timeout, seconds))
                except RuntimeError as error:
                    yield row_of((case, mode, contender), reason=str(error))
                    break
    for job in left:
        yield row_of(job, reason="the time of this run was over")


def row_of(job: Job, **values: Any) -> dict[str, Any]:
    """A row of a report, without measurements."""
    return {**dict(zip(("case", "mode", "contender"), job, strict=True)), **values}


def by_process(jobs: Iterable[Job], device: str) -> list[list[Job]]:
    """Split ``jobs`` into those that share a process.

    On a CPU those of one contender on one case; on a GPU neighbours, but for whole compiled models,
    which may take minutes to compile and hold much memory.
    """

    def key(job: Job) -> Any:
        case, _, contender = job
        shares = device == "cuda" and not CONTENDERS[contender].whole_model
        return "shared" if shares else (case, contender)

    return [list(group) for _, group in itertools.groupby(jobs, key)]


def unsupported(case: Case | PuzzleCase, contender: Contender, device: str = "cpu") -> str | None:
    """Why the engine can't run ``case``, or None; opponents always can."""
    if not contender.is_engine:
        return None
    try:
        model = model_of(case, contender).to(device)
        explain_backend(model, case.batch, case.n_points, contender.precision)
    except ValueError as error:
        return str(error)
    return None


def compare(
    cases: list[str],
    contenders: list[str],
    repeats: int,
    seconds: float,
    device: str = "cpu",
    timeout: float = TIMEOUT_S,
    budget: float = float("inf"),
) -> dict:
    """Run all contenders on all cases; what can't be measured is listed with the reason.

    Args:
        cases, contenders: names.
        repeats: timings of each, at most.
        seconds: for timing each, at most.
        device: ``cpu`` or ``cuda``.
        timeout: seconds for one contender in one mode of one case.
        budget: seconds for all; then nothing more is started, and what runs is ended.

    Returns:
        ``provenance``, ``peak_gflops`` by precision, ``rows`` and ``not_measured``.
    """
    end = time.monotonic() + budget
    threads = sorted({1, len(os.sched_getaffinity(0))}) if device == "cpu" else [1]
    settings = ["--device", device, "--threads", *map(str, threads), "--repeats", str(repeats),
                "--seconds", str(seconds)]  # fmt: skip
    result: dict[str, Any] = {"provenance": provenance("benchmarks.compare", device)}
    load = result["provenance"]["load_before"]
    if load > 0.5 and device == "cpu":
        print(f"the machine is busy (load {load:.1f}): figures will be off", file=sys.stderr)
    with Measuring(settings) as peaks:
        result["peak_gflops"] = peaks.next(timeout)
    rows, jobs = [], []
    for contender in contenders:
        for case in cases:
            case_jobs = [
                (case, m, contender) for m in modes(ALL_CASES[case], CONTENDERS[contender])
            ]
            reason = (
                unsupported(ALL_CASES[case], CONTENDERS[contender], device) if case_jobs else None
            )
            if reason is None:
                jobs += case_jobs
            else:
                rows += [row_of(job, reason=reason) for job in case_jobs]
    for group in by_process(jobs, device):
        rows += measure_jobs(group, settings, timeout, end)
    measured = [row for row in rows if "reason" not in row]
    report.add_ratios(measured, result["peak_gflops"])
    missing = [row for row in rows if "reason" in row]
    return result | {"rows": measured, "not_measured": missing}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line; ``--quick`` changes the defaults of the others."""
    parser = Parser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--cases", nargs="+", choices=ALL_CASES, metavar="CASE",
        help=f"from {', '.join(ALL_CASES)}")  # fmt: skip
    add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME",
        help=f"from {', '.join(map(repr, CONTENDERS))}")  # fmt: skip
    add("--repeats", type=int, help="timings of each, at most")
    add("--quick", action="store_true", help="cases small and lr_b1, without torch.compile")
    add("--timeout", type=float, default=TIMEOUT_S, metavar="S",
        help="seconds for one contender in one mode of one case")  # fmt: skip
    add("--budget", type=float, default=float("inf"), metavar="S",
        help="seconds for everything: what is left then is not measured")  # fmt: skip
    add("--out", type=Path, default=ROOT / "benchmarks" / "results",
        help="folder of compare_<device>.md, .json and .png")  # fmt: skip
    args = parser.parse_args(argv)
    here = {name: c for name, c in CONTENDERS.items() if args.device in c.devices}
    for name in args.contenders or ():
        if name not in here:
            parser.error(f"{name!r} does not run on {args.device}; choose of {', '.join(here)}")
    not_compiled = [name for name, c in here.items() if not c.compiles]
    args.cases = args.cases or (["small", "lr_b1"] if args.quick else list(ALL_CASES))
    args.contenders = args.contenders or (not_compiled if args.quick else list(here))
    repeats, args.seconds = (20, 1.0) if args.device == "cuda" else (50, 20.0)
    if args.quick:
        repeats, args.seconds = 5, min(args.seconds, 2.0)
    args.repeats = args.repeats or repeats
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the files; return 2 if there is no such device."""
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no CUDA device here", file=sys.stderr)
        return 2
    result = compare(
        args.cases, args.contenders, args.repeats, args.seconds, args.device, args.timeout,
        args.budget,
    )  # fmt: skip
    caption = report.caption(result)
    print(caption, report.tables(result["rows"]), report.not_measured(result), sep="\n\n")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"compare_{args.device}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report.markdown(result), encoding="utf-8")
    if result["rows"]:
        report.chart(result["rows"], path.with_suffix(".png"), caption)
    print(f"\nwrote {path}.md, .json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
