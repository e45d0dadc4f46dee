"""Compare the engine with plain PyTorch: ``python -m benchmarks.compare --device cpu``.

Measures time, rate and memory of a training step and of inference at the sizes of the paper, for
eager PyTorch, torch.compile and the engine, in fp32 and bf16; on a GPU (``--device cuda``) with
and without CUDA graphs, for each provider of attention, and the launches, too. Each runs alone in
its own process, on a CPU at its best thread setting, and only if its numbers are right. Prints
tables, and writes Markdown, JSON and a chart. A full run may take an hour on two cores, most of it
spent on compiling whole models; ``--quick`` takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cases import CASES, CONTENDERS, Case, Contender, modes
from looped_fast import LoopedTransformer, explain_backend

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 1800  # for one contender on one case


def measured_in_subprocess(arguments: list[str], timeout: float = TIMEOUT_S) -> Any:
    """What ``python -m benchmarks.measure`` prints.

    Raises:
        RuntimeError: it failed, or took more than ``timeout`` seconds; the message says why.
    """
    with tempfile.TemporaryDirectory() as cache:  # compile times are those of a first run
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.measure", *arguments],
                cwd=ROOT,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                timeout=timeout,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {timeout:.0f} s") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
            raise RuntimeError(lines[-1]) from None
    return json.loads(done.stdout.splitlines()[-1])


def why_not(case: Case, contender: Contender, device: str = "cpu") -> str | None:
    """Why the engine can't run ``case``, if it can't; opponents always can."""
    if not contender.is_engine:
        return None
    model = LoopedTransformer(case.config(), contender.backend, attention=contender.attention)
    try:
        explain_backend(model.to(device), case.batch, case.n_points, contender.precision)
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
        seconds: of timing each, at most.
        device: ``cpu`` or ``cuda``.
        timeout: seconds for one contender on one case.
        budget: seconds for all: nothing is started after them.

    Returns:
        ``provenance``, ``peak_gflops`` by precision, ``rows`` and ``not_measured``.
    """
    end = time.monotonic() + budget
    threads = sorted({1, len(os.sched_getaffinity(0))}) if device == "cpu" else [1]
    settings = ["--device", device, "--threads", *map(str, threads), "--repeats", str(repeats),
                "--seconds", str(seconds)]  # fmt: skip
    result: dict[str, Any] = {"provenance": report.provenance("benchmarks.compare", device)}
    load = result["provenance"]["load_before"]
    if load > 0.5 and device == "cpu":
        print(f"the machine is busy (load {load:.1f}): figures will be off", file=sys.stderr)
    result["peak_gflops"] = measured_in_subprocess(settings)
    rows, missing = [], []
    for contender in contenders:
        for case in cases:
            if not modes(CASES[case], CONTENDERS[contender]):
                continue
            left = end - time.monotonic()
            reason = why_not(CASES[case], CONTENDERS[contender], device)
            if reason is None and left <= 0:
                reason = f"the {budget:.0f} s of this run were over"
            if reason is None:
                print(f"measuring {case}: {contender}", file=sys.stderr, flush=True)
                arguments = ["--case", case, "--contender", contender, *settings]
                try:
                    rows += measured_in_subprocess(arguments, min(timeout, left))
                except RuntimeError as error:
                    reason = str(error)
            if reason is not None:
                missing.append({"case": case, "contender": contender, "reason": reason})
    report.add_ratios(rows, result["peak_gflops"])
    return result | {"rows": rows, "not_measured": missing}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Of the command line; ``--quick`` changes what the others are by default."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME",
        help=f"of {', '.join(map(repr, CONTENDERS))}")  # fmt: skip
    add("--repeats", type=int, help="timings of each, at most")
    add("--quick", action="store_true", help="cases small and lr_b1, without torch.compile")
    add("--timeout", type=float, default=TIMEOUT_S, metavar="S",
        help="seconds for one contender on one case")  # fmt: skip
    add("--budget", type=float, default=float("inf"), metavar="S",
        help="seconds for everything: what is left then is not measured")  # fmt: skip
    add("--out", type=Path, default=ROOT / "benchmarks" / "results",
        help="folder of compare_<device>.md, .json and .png")  # fmt: skip
    args = parser.parse_args(argv)
    here = {name: c for name, c in CONTENDERS.items() if args.device in c.devices}
    for name in args.contenders or ():
        if name not in here:
            parser.error(f"{name!r} does not run on {args.device}; choose of {', '.join(here)}")
    not_compiled = [name for name, c in here.items() if not c.compiled]
    args.cases = args.cases or (["small", "lr_b1"] if args.quick else list(CASES))
    args.contenders = args.contenders or (not_compiled if args.quick else list(here))
    args.repeats = args.repeats or (5 if args.quick else 50)
    args.seconds = 2.0 if args.quick else 20.0
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the files; 2 where there is no such device."""
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
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(report.markdown(result))
    if result["rows"]:
        report.chart(result["rows"], path.with_suffix(".png"), caption)
    print(f"\nwrote {path}.md, .json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
