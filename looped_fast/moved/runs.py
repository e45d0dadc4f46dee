"""``looped_fast.pretrained.load_run`` where it was until version 0.1."""

from looped_fast.pretrained.runs import Run, load_run

__all__ = ["Run", "load_run"]
