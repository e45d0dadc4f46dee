"""Build the CPU engine ahead of its first use: ``python -m looped_fast.build``."""

from __future__ import annotations

import sys

from looped_fast.training.command_line import Parser, program


def main(args: list[str] | None = None) -> int:
    """Build the CPU engine for the PyTorch that is installed, ahead of its first use."""
    Parser(program("build"), description=main.__doc__).parse_args(args)
    raise NotImplementedError("looped_fast.build holds the place of the command that builds")


if __name__ == "__main__":
    sys.exit(main())
