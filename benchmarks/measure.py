"""Measure one contender on one case, alone in this process; prints one JSON value.

``benchmarks.compare`` starts it once per case and contender, so that nobody is timed beside
another's threads, memory or compiled code.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, CONTENDERS, Case, Contender, flops
from benchmarks.correctness import check
from benchmarks.workload import Workload, fresh_compiler


def measure(
    case: Case, contender: Contender, mode: str, threads: list[int], repeats: int, seconds: float
) -> dict[str, Any]:
    """Check, then time at the best of ``threads``, ``repeats`` times or ``seconds`` long.

    Raises:
        benchmarks.correctness.WrongResult: nothing was timed.
    """
    check(case, contender, mode)
    best_threads, first = _best_threads(case, contender, mode, threads)
    torch.set_num_threads(best_threads)
    with fresh_compiler(contender):
        run = Workload(case, contender, mode)
        if contender.compiled:
            first = max(first, seconds_of(run))
        memory = memory_added_by(run)  # warms up, too
        times: list[float] = []
        while len(times) < 2 or (len(times) < repeats and sum(times) < seconds):
            times.append(seconds_of(run))
    median = statistics.median(times)
    return {
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "repeats": len(times),
        "threads": best_threads,
        "gflops": flops(case, mode) / median / 1e9,
        "memory_mb": memory,
        "compile_s": first - median if contender.compiled else None,
    }


def _best_threads(
    case: Case, contender: Contender, mode: str, threads: list[int]
) -> tuple[int, float]:
    """The fastest setting on two loop steps, and the longest first call in seconds (it compiles).

    A full run may take half a minute, and threads do not gain from a larger number of steps.
    """
    case = dataclasses.replace(case, n_loops=2, window=2)
    first, times = 0.0, {}
    for n in threads:
        torch.set_num_threads(n)
        with fresh_compiler(contender):
            run = Workload(case, contender, mode)
            first = max(first, seconds_of(run))
            times[n] = min(seconds_of(run) for _ in range(3))
    return min(times, key=lambda n: times[n]), first


def seconds_of(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memory_added_by(run: Callable[[], object]) -> float:
    """Peak resident memory during ``run`` above what was resident before, in MB. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)  # hand freed memory back: its reuse would not show
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = _status_mb("VmRSS")
    run()
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024 / 1e6


def peak_gflops(dtype: torch.dtype, seconds: float) -> float:
    """The best rate of ``torch.mm`` on this machine, over several shapes, ``seconds`` for each."""
    best = 0.0
    for m, k, n in ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (8192, 512, 2048)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * m * k * n / (time.perf_counter() - start) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, help="the peak is measured without one")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--threads", type=int, nargs="+", required=True, help="settings to try")
    parser.add_argument("--repeats", type=int, required=True, help="timings, at most")
    parser.add_argument("--seconds", type=float, required=True, help="stop repeating after these")
    args = parser.parse_args()
    if args.contender is None:
        torch.set_num_threads(max(args.threads))
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        print(json.dumps({name: peak_gflops(d, args.seconds / 8) for name, d in dtypes.items()}))
        return
    case, contender = CASES[args.case], CONTENDERS[args.contender]
    rows = [
        {"case": args.case, "mode": mode, "contender": args.contender}
        | measure(case, contender, mode, args.threads, args.repeats, args.seconds)
        for mode in case.modes
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
