"""Compare the engine with plain PyTorch: ``python -m benchmarks.compare --device cpu``.

Measures time, rate and memory of a training step and of inference at the sizes of the paper, for
eager PyTorch, torch.compile and the engine, in fp32 and bf16. Each runs alone in its own process,
at its best thread setting, and only if its numbers are right. Prints tables, and writes JSON and
a chart. A full run may take an hour on two cores, most of it spent on compiling whole models;
``--quick`` takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import CASES, CONTENDERS, Case, Contender
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


def why_not(case: Case, contender: Contender) -> str | None:
    """Why the engine can't run ``case``, if it can't; opponents always can."""
    if not contender.is_engine:
        return None
    explanation = explain_backend(
        LoopedTransformer(case.config()), case.batch, case.n_points, contender.precision
    )
    return explanation.reasons.get(contender.backend)


def compare(cases: list[str], contenders: list[str], repeats: int, seconds: float) -> dict:
    """Run all contenders on all cases; what can't be measured is listed with the reason.

    Returns:
        ``provenance``, ``peak_gflops`` by precision, ``rows`` and ``not_measured``.
    """
    cores = len(os.sched_getaffinity(0))
    settings = ["--threads", *map(str, sorted({1, cores})), "--repeats", str(repeats),
                "--seconds", str(seconds)]  # fmt: skip
    result: dict[str, Any] = {"provenance": report.provenance()}
    load = result["provenance"]["load_before"]
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): figures will be off", file=sys.stderr)
    result["peak_gflops"] = measured_in_subprocess(settings)
    rows, missing = [], []
    for case in cases:
        for contender in contenders:
            reason = why_not(CASES[case], CONTENDERS[contender])
            if reason is None:
                print(f"measuring {case}: {contender}", file=sys.stderr, flush=True)
                try:
                    rows += measured_in_subprocess(
                        ["--case", case, "--contender", contender, *settings]
                    )
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
    add("--device", choices=["cpu"], default="cpu")
    add("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME",
        help=f"of {', '.join(map(repr, CONTENDERS))}")  # fmt: skip
    add("--repeats", type=int, help="timings of each, at most")
    add("--quick", action="store_true", help="cases small and lr_b1, without torch.compile")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results",
        help="folder of compare_cpu.json and compare_cpu.png")  # fmt: skip
    args = parser.parse_args(argv)
    not_compiled = [name for name, c in CONTENDERS.items() if not c.compiled]
    args.cases = args.cases or (["small", "lr_b1"] if args.quick else list(CASES))
    args.contenders = args.contenders or (not_compiled if args.quick else list(CONTENDERS))
    args.repeats = args.repeats or (5 if args.quick else 50)
    args.seconds = 2.0 if args.quick else 20.0
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the files."""
    args = parse_arguments(argv)
    result = compare(args.cases, args.contenders, args.repeats, args.seconds)
    origin, peak = result["provenance"], result["peak_gflops"]
    caption = (
        f"{origin['cpu']}, {origin['cores']} cores, torch {origin['torch']}; "
        f"peak {peak['fp32']:.0f} (fp32) and {peak['bf16']:.0f} (bf16) GFLOP/s"
    )
    print(caption, report.tables(result["rows"]), sep="\n\n")
    for entry in result["not_measured"]:
        print("\nnot measured: {case}, {contender}: {reason}".format(**entry), end="")
    print()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"compare_{args.device}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    if result["rows"]:
        report.chart(result["rows"], path.with_suffix(".png"), caption)
    print(f"\nwrote {path}.json and .png")


if __name__ == "__main__":
    main()
