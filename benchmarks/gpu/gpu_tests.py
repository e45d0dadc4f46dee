"""Run the tests marked gpu, and show what pytest prints last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

from benchmarks.gpu.visit import Visit, say
from benchmarks.processes import ROOT

WORKERS = 6  # processes that share the GPU


def command(dry: bool) -> list[str]:
    """Command line of pytest; a dry run only collects."""
    call = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "--tb=line"]
    call += ["-p", "no:cacheprovider"]
    if dry:
        return [*call, "--collect-only"]
    return [*call, "--durations=4", *(["-n", str(WORKERS)] if find_spec("xdist") else [])]


def run(visit: Visit) -> None:
    """Run pytest, show its last lines, and exit with its status if a test failed."""
    # Deterministic cuBLAS needs a fixed workspace.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        command(visit.dry), cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    say("\n".join(lines[-30:]))
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", lines[-1] if lines else "")}
    visit.save("tests", counts=counts)
    if done.returncode:
        raise SystemExit(done.returncode)
