"""Evaluate on each tabular set, held out of training in turn: ``python -m looped_fast.openml``."""

import sys

from looped_fast.paper.openml import main

if __name__ == "__main__":
    sys.exit(main())
