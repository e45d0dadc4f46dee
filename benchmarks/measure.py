"""Measure contenders on cases in this process, and print a line of JSON for each.

``benchmarks.compare`` starts it, on a CPU once per case and contender, so that no contender is
timed beside another's threads, memory or compiled code.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import ALL_CASES, CONTENDERS, Case, Contender, PuzzleCase, flops
from benchmarks.correctness import WrongResult, check, check_results, error_limits
from benchmarks.workload import Workload, forget_compiled
from looped_fast.ops import cpu_engine

# Calls per timing. Training steps are enqueued ahead of a GPU; inference waits for each result.
CALLS = {"cpu": {"training": 1, "inference": 1}, "cuda": {"training": 10, "inference": 1}}


def measure(
    case: Case | PuzzleCase,
    contender: Contender,
    mode: str,
    threads: list[int],
    repeats: int,
    seconds: float,
    device: str = "cpu",
) -> dict[str, Any]:
    """Check, then time ``repeats`` times or ``seconds`` long, on a CPU at the best of ``threads``.

    Raises:
        benchmarks.correctness.WrongResult: nothing was timed.
    """
    if device == "cuda":
        return measure_full_batch(case, contender, mode, repeats, seconds)
    check(case, contender, mode)
    best_threads, first = _best_threads(case, contender, mode, threads)
    torch.set_num_threads(best_threads)
    forget_compiled()
    run = Workload(case, contender, mode)
    if contender.compiles:
        first = max(first, seconds_of(run))
    memory = memory_added_by(run)  # warms up, too
    times = _times(run, repeats, seconds)
    return _row(case, contender, mode, times, first, memory) | {"threads": best_threads}


def measure_full_batch(
    case: Case | PuzzleCase,
    contender: Contender,
    mode: str,
    repeats: int,
    seconds: float,
    device: str = "cuda",
    keep_wrong: bool = False,
) -> dict[str, Any]:
    """Check and time one workload, so that it is compiled and captured once.

    Args:
        keep_wrong: for a diagnosis, also time wrong results; ``wrong`` says what is off.

    Raises:
        benchmarks.correctness.WrongResult: nothing was timed.
    """
    limits = error_limits(case, contender.precision, mode, device)
    forget_compiled()
    run = Workload(case, contender, mode, device=device)
    call = run.forward if mode == "inference" else run.forward_backward
    first = seconds_of(call)
    memory = memory_added_by(call, device)
    row: dict[str, Any] = {"threads": 1}
    try:
        check_results(run, limits)
    except WrongResult as error:
        if not keep_wrong:
            raise
        row["wrong"] = str(error)
    for _ in range(3 if contender.graphs else 1):
        run()  # a whole step has a graph of its own
    row |= {"launches": launches(run)} if device == "cuda" else {}
    times = _times(run, repeats, seconds, CALLS[device][mode])
    return _row(case, contender, mode, times, first, memory) | row


def _times(run: Workload, repeats: int, seconds: float, calls: int = 1) -> list[float]:
    """Seconds per call, each the mean of ``calls``."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < repeats and sum(times) * calls < seconds):
        times.append(seconds_of(run, calls))
    return times


def _row(
    case: Case | PuzzleCase,
    contender: Contender,
    mode: str,
    times: list[float],
    first: float,
    memory: float,
) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "repeats": len(times),
        "gflops": flops(case, mode) / median / 1e9,
        "memory_mb": memory,
        "launches": None,
        "compile_s": first - median if contender.compiles else None,
    }


_QUICK = 3e10  # operations: a third of a second, or less


def _best_threads(
    case: Case | PuzzleCase, contender: Contender, mode: str, threads: list[int]
) -> tuple[int, float]:
    """The fastest setting, and the longest first call in seconds (it compiles).

    If a full run may take half a minute, few loop steps are timed: more steps do not change which
    setting wins. In a run of milliseconds they do, as threads are woken once.
    """
    if len(threads) == 1:
        return threads[0], 0.0
    runs = 9
    if flops(case, mode) > _QUICK:
        case, runs = case.shorter(), 3
    first, times = 0.0, {}
    for n in threads:
        torch.set_num_threads(n)
        forget_compiled()
        run = Workload(case, contender, mode)
        first = max(first, seconds_of(run))
        times[n] = min(seconds_of(run) for _ in range(runs))
    return min(times, key=lambda n: times[n]), first


def seconds_of(run: Callable[[], object], calls: int = 1) -> float:
    """Mean wall time of ``calls`` calls in a row, until a GPU is done with them."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def memory_added_by(run: Callable[[], object], device: str = "cpu") -> float:
    """Peak memory during ``run`` above what was in use before, in MB.

    On a GPU of PyTorch's allocator, over three calls: the second may capture a CUDA graph. On a CPU
    resident memory of the process, on Linux only.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    cpu_engine.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)  # else reuse of freed memory would not show
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM, the peak
    before = _status_mb("VmRSS")
    run()
    return _status_mb("VmHWM") - before


# Calls of the CUDA runtime and driver by which the host starts work on the GPU.
LAUNCHES = re.compile(r"(cuda|cu|hip|hipModule|hipExtModule)(Launch|GraphLaunch|Memcpy|Memset)\w*")


def launches(run: Callable[[], object]) -> int:
    """How often the host starts work on the GPU in one call: kernels, copies, whole graphs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return count_launches((event.key, event.count) for event in profiler.key_averages())


def count_launches(calls: Iterable[tuple[str, int]]) -> int:
    """Number of ``LAUNCHES`` among the (name, count) of a profile."""
    return sum(count for name, count in calls if LAUNCHES.fullmatch(name))


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024 / 1e6


PEAK_SHAPES = {  # (m, k, n) of torch.mm
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (8192, 512, 2048)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}


def peak_gflops(dtype: torch.dtype, seconds: float, device: str = "cpu") -> float:
    """Best rate of ``torch.mm`` on this machine over ``PEAK_SHAPES``, ``seconds`` for each."""
    best = 0.0
    for m, k, n in PEAK_SHAPES[device]:
        a, b = (
            torch.randn(m, k, device=device).to(dtype),
            torch.randn(k, n, device=device).to(dtype),
        )
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            rate = 2 * m * k * n / seconds_of(lambda a=a, b=b: torch.mm(a, b)) / 1e9
            best = max(best, rate)
    return best


def parse_job(job: str) -> tuple[str, str, str]:
    """Case, mode and contender of ``"lr training: eager bf16"``."""
    where, contender = job.split(": ")
    case, mode = where.split(" ")
    return case, mode, contender


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", help="'CASE MODE: CONTENDER'; none: the peak rates")
    parser.add_argument("--device", choices=CALLS, default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", required=True, help="settings to try")
    parser.add_argument("--repeats", type=int, required=True, help="timings, at most")
    parser.add_argument("--seconds", type=float, required=True, help="stop repeating after these")
    args = parser.parse_args()
    if not args.jobs:
        torch.set_num_threads(max(args.threads))
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        peaks = {
            name: peak_gflops(dtype, args.seconds / 8, args.device)
            for name, dtype in dtypes.items()
        }
        print(json.dumps(peaks))
    for job in args.jobs:
        case, mode, contender = parse_job(job)
        settings = (args.threads, args.repeats, args.seconds, args.device)
        row = {"case": case, "mode": mode, "contender": contender}
        try:
            row |= measure(ALL_CASES[case], CONTENDERS[contender], mode, *settings)
        except WrongResult as error:
            row["reason"] = f"wrong result: {error}"
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
