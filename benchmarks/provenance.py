"""Provenance of measurements: machine, versions, commit and command, stored beside them."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# Written by benchmarks/gpu/prepare.sh, for a machine to which the tree is copied without git.
PREPARED_COMMIT = ROOT / ".gpu" / "commit"


def provenance(module: str, device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, commit and command of a run of ``module`` on ``device``."""
    gpu = _gpu() if device == "cuda" else {}
    return gpu | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
    }


def commit() -> str:
    """Commit of this tree, ``+changes`` if any; without git the prepared one, or ``unknown``."""
    if (head := _git("rev-parse", "HEAD")) is not None:
        return head + ("+changes" if _git("status", "--porcelain") else "")
    if PREPARED_COMMIT.exists():
        return f"{PREPARED_COMMIT.read_text(encoding='utf-8').strip()} (as prepared; no git here)"
    return "unknown"


def _git(*args: str) -> str | None:
    """Output of git in this source tree; None without git or a repository."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "flash-attn": _version("flash-attn"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return models[0] if models else platform.processor()
