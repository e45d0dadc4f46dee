"""Weights that were trained with this library and ship with it: ``from_pretrained("lr-small")``.

A name is ``<task>-<preset>`` for a looped model, ``<task>-<model>-<preset>`` for another; those of
the demo have their dimensions in place of the model. Each is a folder here: ``model.safetensors``
and ``checkpoint.json`` (``checkpoint.export_weights``), and ``README.md``, its card.
``python -m looped_fast.pretrained --help`` makes one from a run.
"""

from looped_fast.pretrained.runs import Run, load_run
from looped_fast.pretrained.trm import TRMRun, load_trm_run
from looped_fast.pretrained.weights import (
    find_checkpoint,
    from_pretrained,
    load_start,
    names,
    path,
    train_config,
)

__all__ = [
    "Run", "TRMRun", "find_checkpoint", "from_pretrained", "load_run", "load_start",
    "load_trm_run", "names", "path", "train_config"
]  # fmt: skip
