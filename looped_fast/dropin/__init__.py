"""Speed up a model that was not written for this library, in place."""

from looped_fast.dropin.checks import UnsupportedModel
from looped_fast.dropin.explain import explain_backend
from looped_fast.dropin.replacement import accelerate, restore

__all__ = ["UnsupportedModel", "accelerate", "explain_backend", "restore"]
