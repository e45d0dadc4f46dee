"""Old name, until version 0.1, of ``looped_fast.evaluation.baselines``."""

from looped_fast.evaluation.baselines import *  # noqa: F403
