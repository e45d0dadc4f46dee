"""Probe what the hidden states encode at each loop step: ``python -m looped_fast.state_probes``."""

import sys

from looped_fast.paper.state_probes import main

if __name__ == "__main__":
    sys.exit(main())
