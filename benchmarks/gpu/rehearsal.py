"""Run parts of a visit up to their first kernel launch, without a GPU.

    python -m benchmarks.gpu.rehearsal [PART ...]

Nothing is interpreted: host code, Triton's launch path and the compiler run as on an H100, behind a
driver that claims to be one, at the sizes of a dry run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

from benchmarks.gpu.parts import PARTS

REHEARSED = ("compile", "smoke", "rows", "steps", "profile")


def first_launch(part: str) -> str | None:
    """Name of the first kernel that a part launches; None if it ends without a launch."""
    from benchmarks.gpu.fake_driver import Launched, pretend
    from benchmarks.gpu.visit import Visit
    from looped_fast.ops import triton_backend

    pretend()
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[part].module}")
    # Accept CPU tensors in place of a GPU's.
    accept_cpu = mock.patch.object(triton_backend, "_interpreting", return_value=True)
    with tempfile.TemporaryDirectory() as folder, accept_cpu:
        try:
            module.run(Visit(Path(folder), dry=True))
        except Launched as launched:
            return str(launched)
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=REHEARSED)
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
    for part in parser.parse_args(argv).parts:
        kernel = first_launch(part)
        end = f"up to the launch of {kernel}" if kernel else "to its end without a launch"
        print(f"{part} runs {end}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
