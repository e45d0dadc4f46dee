"""Fresh virtual environments, and commands that must succeed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
START = time.monotonic()


def run(*command, cwd=None, env=None):
    """Run a command; return what it printed on both streams, or exit if it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **(env or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\n{command} ended with status {done.returncode}")
    return done.stdout


def say(what):
    """Print what was done, after how many seconds."""
    print(f"[{time.monotonic() - START:4.0f} s] {what}", flush=True)


class Environment:
    """A fresh virtual environment with PyTorch, in a folder where no other file lies."""

    def __init__(self, folder: Path, *packages: str, python: str = sys.executable) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        run(python, "-m", "venv", folder / "venv")
        self.pip("install", *packages)

    def pip(self, *arguments):
        """Run pip with its defaults."""
        return run(self.bin / "python", "-m", "pip", "--quiet", *arguments, cwd=self.folder)

    def smoke(self, *flags, compiler: bool = True, cache: str = "cache", **env: str) -> str:
        """Run the smoke test with these flags; return what it printed.

        compiler: whether there is one on the PATH. cache: the folder for engines, in this one.
        """
        path = os.environ["PATH"] if compiler else str(self.bin)
        env = {"PATH": path, "XDG_CACHE_HOME": str(self.folder / cache), **env}
        return run(self.bin / "python", HERE / "smoke.py", *flags, cwd=self.folder, env=env)
