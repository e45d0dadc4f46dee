"""Measurements in subprocesses, whose results are read as they come."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Measuring:
    """A running ``python -m benchmarks.measure ARGUMENTS``; a context that ends it.

    Inductor starts without a cache, so that compile times are those of a first run.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._errors = Path(self._folder.name, "errors")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.measure", *arguments],
                cwd=ROOT,
                env={
                    **os.environ,
                    "TORCHINDUCTOR_CACHE_DIR": str(Path(self._folder.name, "cache")),
                },
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, timeout: float) -> Any:
        """Return the next value that the process prints.

        Raises:
            RuntimeError: the process failed, and why, or took more than ``timeout`` seconds.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise RuntimeError(f"not done after {timeout:.0f} s") from None
        if line is None:
            status = self._process.wait()
            printed = self._errors.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError((printed.strip().splitlines() or [f"exit status {status}"])[-1])
        return json.loads(line)

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
