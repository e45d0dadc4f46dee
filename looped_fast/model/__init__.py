"""The in-context learner, a module with the official parameter names."""

from looped_fast.model.transformer import LoopedTransformer, ambient_precision

__all__ = ["LoopedTransformer", "ambient_precision"]
