"""Old name, until version 0.1, of ``looped_fast.pretrained.load_run``."""

from looped_fast.pretrained.runs import Run, load_run

__all__ = ["Run", "load_run"]
