"""Reproduce the paper's figures: ``python -m looped_fast.reproduce``."""

import sys

from looped_fast.paper.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
