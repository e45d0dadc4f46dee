"""Looped transformers, fast. See README.md; importing this has no side effects."""

from looped_fast.config import ModelConfig
from looped_fast.dropin import UnsupportedModel, accelerate, restore
from looped_fast.explain import explain_backend
from looped_fast.model import LoopedTransformer
from looped_fast.pretrained import from_pretrained

__version__ = "0.1.0"
__all__ = [
    "LoopedTransformer",
    "ModelConfig",
    "UnsupportedModel",
    "accelerate",
    "explain_backend",
    "from_pretrained",
    "restore",
]
