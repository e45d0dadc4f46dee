"""Measure on a GPU, each part in a process of its own: ``python -m benchmarks.gpu [PART ...]``.

Prints short tables; writes gpu_<card>.json, with everything and where it came from, and
gpu_<card>.md, to be committed. Needs no installation and no network.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.gpu.parts import BUDGET_S, DEFAULT, PARTS
from benchmarks.gpu.requirements import problems

if TYPE_CHECKING:
    from benchmarks.gpu.visit import Visit

ROOT = Path(__file__).parent.parent.parent


class Outcome(NamedTuple):
    """Outcome of a part."""

    status: str  # "done", or the failure
    seconds: float
    output: str  # printed text


def run_part(part: str, visit: Visit, limit: float) -> Outcome:
    """Run a part and show its output; kill it and its children after ``limit`` seconds."""
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.part", part, str(visit.out)]
    process = subprocess.Popen(
        [*command, *(["--dry"] if visit.dry else [])],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    timer.cancel()
    outcome = "done" if status == 0 else f"failed with exit status {status}"
    if stopped.is_set():
        outcome = f"stopped after {limit:.0f} s; what it had measured is kept"
    return Outcome(outcome, time.monotonic() - start, "".join(lines))


def run_parts(parts: list[str], visit: Visit, budget: float) -> bool:
    """Run ``parts`` within ``budget`` seconds, save results after each; True if all were done."""
    from benchmarks.gpu.page import write_page
    from benchmarks.provenance import provenance

    origin = provenance("benchmarks.gpu", visit.device.type)
    end, all_done = time.monotonic() + budget, True
    for i, part in enumerate(parts):
        left = end - time.monotonic()
        if left < 1:
            print(f"--- not started, the {budget:.0f} s were over: {', '.join(parts[i:])}")
            all_done = False
            break
        print(f"--- {part}: {PARTS[part].summary}", flush=True)
        visit.start(part, provenance=origin, status="not finished", output="")
        outcome = run_part(part, visit, min(PARTS[part].limit, left))
        print(f"--- {part}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        visit.save(part, **outcome._asdict())
        write_page(visit)
        all_done &= outcome.status == "done"
    print(f"wrote {visit.path} and .md")
    return all_done


def main(argv: list[str] | None = None) -> int:
    """Run; return 1 if a part failed or was cut off, 2 if a requirement is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog="\n".join(f"{name:8} {p.limit:4} s  {p.summary}" for name, p in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART",
        help="from the list below, in this order; all but paper by default",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="folder of results; $OUT or benchmarks/results by default",
        default=os.environ.get("OUT") or ROOT / "benchmarks" / "results",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S",
                        help="seconds for everything")  # fmt: skip
    parser.add_argument("--dry", action="store_true",
                        help="on the CPU, in Triton's interpreter, at tiny sizes")  # fmt: skip
    args = parser.parse_args(argv)
    parts = args.parts or list(DEFAULT)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if reasons := problems(parts, args.dry):
        print("\n".join(f"gpu-check: {reason}" for reason in reasons), file=sys.stderr)
        return 2
    from benchmarks.gpu.visit import Visit

    visit = Visit(Path(args.out).resolve(), args.dry)
    return 0 if run_parts(parts, visit, args.budget) else 1


if __name__ == "__main__":
    sys.exit(main())
