"""Train a model of the paper for ``$SECONDS``, and pack the run to resume it anywhere."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.train import TINY, trained
from benchmarks.gpu.visit import Visit, say

SECONDS = 400


def run(visit: Visit) -> None:
    """Write ``paper.tgz`` beside the other results; ``$TASK`` is the task, lr by default."""
    seconds, task = float(os.environ.get("SECONDS", SECONDS)), os.environ.get("TASK", "lr")
    longest = PARTS["paper"].limit - 60  # for the start, the last checkpoint and packing
    if seconds > longest:
        raise SystemExit(
            f"SECONDS = {seconds:.0f} is more than {longest} in one visit: resume the packed run "
            f"in another, or use python -m looped_fast.train without a limit"
        )
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, f"{task}-paper")
        arguments = TINY if visit.dry else ("--preset", "paper", "--keep", "1")
        log = trained(run_dir, arguments, seconds, visit, task)
        packed = visit.out / "paper.tgz"
        visit.out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(run_dir, run_dir.name)
    visit.save("paper", task=task, log=log)
    say(f"wrote {packed}; unpack it and continue by python -m looped_fast.train --resume")
