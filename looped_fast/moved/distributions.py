"""Old name, until version 0.1, of ``looped_fast.evaluation.shifts``."""

from looped_fast.evaluation.shifts import *  # noqa: F403
