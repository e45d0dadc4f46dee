"""``looped_fast.evaluation.baselines``, where it was until version 0.1."""

from looped_fast.evaluation.baselines import *  # noqa: F403
