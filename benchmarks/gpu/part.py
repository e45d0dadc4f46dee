"""Run one part in this process: ``python -m benchmarks.gpu.part NAME OUT [--dry]``."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.visit import Visit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args(argv)
    # Set before Triton is imported. It can compile without a GPU.
    interpreted = args.dry and args.part != "compile"
    os.environ["TRITON_INTERPRET"] = "1" if interpreted else "0"
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[args.part].module}")
    module.run(Visit(args.out, args.dry))


if __name__ == "__main__":
    main()
