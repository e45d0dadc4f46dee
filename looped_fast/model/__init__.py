"""The in-context learner and the Tiny Recursive Model, with their public parameter names."""

from looped_fast.model.on_backend import ambient_precision
from looped_fast.model.transformer import LoopedTransformer
from looped_fast.model.trm import Carry, Solution, TinyRecursiveModel, TRMOutput
from looped_fast.model.trm_config import TRMConfig

__all__ = [
    "Carry", "LoopedTransformer", "Solution", "TRMConfig", "TRMOutput", "TinyRecursiveModel",
    "ambient_precision",
]  # fmt: skip
