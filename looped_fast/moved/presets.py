"""Print the presets: ``python -m looped_fast.presets``, from before they were in ``training``."""

import sys

from looped_fast.training.presets import main, preset_config

__all__ = ["main", "preset_config"]

if __name__ == "__main__":
    sys.exit(main())
