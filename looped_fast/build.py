"""Compile the CPU engine ahead of its first use: ``python -m looped_fast.build``."""

import sys

from looped_fast.errors import EXPECTED, report
from looped_fast.ops import engine_file
from looped_fast.training.command_line import Parser, program


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 if there can be no engine."""
    Parser(program("build"), description=__doc__).parse_args(args)
    try:
        if reason := engine_file.unsupported():
            raise engine_file.BuildError(f"there is no CPU engine for this machine: {reason}")
        print(engine_file.load(retry=True))
    except EXPECTED as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
