"""Run one of the paper's ablations: ``python -m looped_fast.sweep``."""

import sys

from looped_fast.paper.sweep import main

if __name__ == "__main__":
    sys.exit(main())
