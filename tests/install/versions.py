"""Installs and tests the package with each supported Python: ``make test-pythons``.

Every pair of Python and PyTorch gets a fresh environment, of up to 6 GB for the time of its tests:
PyPI's PyTorch for Linux brings CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import ROOT, Environment, say

TESTS = ("tests/ops", "tests/model", "tests/dropin", "tests/test_model.py")


def interpreter(version: str) -> str:
    """The path of a Python of this minor version, on the PATH or of pyenv."""
    versions = Path.home() / ".pyenv" / "versions"
    for python in f"python{version}", *versions.glob(f"{version}.*/bin/python"):
        silently = {
            "stderr": subprocess.DEVNULL
        }  # pyenv's shims may name no version that is active
        if shutil.which(python) and subprocess.call([python, "-c", ""], **silently) == 0:
            return str(python)
    sys.exit(f"no python{version} on the PATH or in {versions}; install it, or name other pairs")


def main(*pairs: str) -> None:
    """Test pairs such as ``3.10:2.8.0``; exit with 1 if any fails."""
    rows, failed = [], False
    for python, torch in (pair.split(":") for pair in pairs):
        with tempfile.TemporaryDirectory(prefix="looped_fast-versions-") as folder:
            packages = [f"torch=={torch}", "pytest", "pytest-xdist", "hypothesis"]
            fresh = Environment(Path(folder), *packages, python=interpreter(python))
            fresh.pip("install", ROOT)
            fresh.smoke("--backend=cpu")
            say(f"Python {python}, PyTorch {torch}: installed, ten steps trained")
            done = subprocess.run(
                [
                    fresh.bin / "python", "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile",
                    "-p", "no:cacheprovider", *TESTS,
                ],
                cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8",
                env={**os.environ, "XDG_CACHE_HOME": str(fresh.folder / "cache"),
                     "OMP_WAIT_POLICY": "passive"},
            )  # fmt: skip
            if done.returncode:
                print(done.stdout)
            counts = ", ".join(re.findall(r"\d+ (?:failed|passed|skipped|error)", done.stdout))
            say(f"Python {python}, PyTorch {torch}: {counts}")
            rows.append(f"| {python} | {torch} | {counts} |")
            failed |= bool(done.returncode)
    print("| Python | PyTorch | tests |", "|---|---|---|", *rows, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
