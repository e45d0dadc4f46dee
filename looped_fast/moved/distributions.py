"""``looped_fast.evaluation.shifts``, under its name until version 0.1."""

from looped_fast.evaluation.shifts import *  # noqa: F403
