"""Train the paper's linear regression for a minute, its curriculum ten times as fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.visit import Visit, say
from benchmarks.processes import ROOT
from looped_fast.training.log import METRICS_FILE, read_metrics
from looped_fast.training.presets import preset_config

SECONDS = 60
FASTER = 10
TINY = ("--preset", "tiny", "--steps", "2", "--log-every", "1", "--batch-size", "2",
        "--eval-prompts", "2")  # fmt: skip


def run(visit: Visit) -> None:
    """Print steps per second, loss and error during training."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TINY if visit.dry else _quick()
        log = trained(Path(folder, "run"), arguments, SECONDS, visit)
    visit.save("train", log=log)


def _quick() -> list[str]:
    config = preset_config("paper", "lr")
    arguments = ["--preset", "paper", "--lr", "3e-4", "--warmup-steps", "500"]
    arguments += ["--clip-grad-norm", "1", "--steps", "60000", "--log-every", "1000"]
    for name in ("dims", "points", "loops"):
        interval = max(1, getattr(config.curriculum, name).interval // FASTER)
        arguments += [f"--curriculum.{name}.interval", str(interval)]
    return arguments


def trained(
    run_dir: Path, arguments: Sequence[str], seconds: float, visit: Visit, task: str = "lr"
) -> list[dict[str, Any]]:
    """Train in a subprocess, stopped after ``seconds``; return the lines of its log.

    Raises:
        SystemExit: training failed (the last lines of its output are printed) or logged nothing.
    """
    command = [sys.executable, "-m", "looped_fast.train", "--task", task, "--out", str(run_dir)]
    command += ["--device", visit.device.type, *arguments]
    command += [] if visit.dry else ["--amp", "bf16", "--cuda-graphs", "on"]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it finishes the step and writes a checkpoint
            process.wait()
            status = 0
        output.seek(0)
        lines = output.read().splitlines()
    say("\n".join(line for line in lines[-8:] if line.strip()))
    if status:
        raise SystemExit(status)
    log = [line for line in read_metrics(run_dir / METRICS_FILE) if "loss" in line]
    if not log:
        raise SystemExit(f"no step was logged in {seconds:.0f} s")
    say(f"{time.monotonic() - start:.0f} s in all")
    for line in log[:: max(1, len(log) // 12)]:
        say(json.dumps({name: _short(value) for name, value in line.items()}))
    return log


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
