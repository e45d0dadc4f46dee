"""Which backend runs a model, and why not another: ``looped_fast.explain_backend``."""

from __future__ import annotations

from typing import Any

from torch import nn

from looped_fast.config import PRECISIONS
from looped_fast.dropin.forward import FastForward
from looped_fast.dropin.replacement import OwnModel, replaced
from looped_fast.dropin.trm import TRMForward
from looped_fast.errors import check_name
from looped_fast.model import TinyRecursiveModel
from looped_fast.ops import backends
from looped_fast.ops.selection import Selection


def explain_backend(
    model: nn.Module,
    batch_size: int,
    n_points: int | None = None,
    precision: str | None = None,
    *,
    replayed_training: bool = False,
) -> Selection:
    """Say which backend runs ``model`` on such a batch, and why each other one does not.

    >>> from looped_fast import LoopedTransformer, ModelConfig
    >>> print(explain_backend(LoopedTransformer(ModelConfig()), batch_size=64, n_points=41))
    backend: ...

    Args:
        model: a ``LoopedTransformer`` or ``TinyRecursiveModel``, or any model after ``accelerate``.
        batch_size: prompts, or puzzles.
        n_points: in-context points of a prompt, of two tokens each; tokens for a language model,
            nanoGPT's ``GPT`` or ``GPT2Model``. Needed but for a Tiny Recursive Model, whose
            configuration tells.
        precision: ``fp32``, ``bf16`` or ``fp16``; None: what ``accelerate`` was given, else that
            of ``torch.autocast`` around this call.
        replayed_training: describe a training step that ``Trainer`` replays as a CUDA graph; by
            default, a call without gradients.

    Raises:
        ValueError: a model of other code is not accelerated, a forced backend can't run the
            model, an unknown precision, or a size below 1.
    """
    replacement = replaced(model)
    described = replacement if isinstance(replacement, FastForward) else model
    if not isinstance(described, OwnModel | FastForward):
        raise ValueError(
            f"a {type(model).__name__} runs its own code; looped_fast.accelerate(model) first"
        )
    sizes = {"batch_size": batch_size, "n_points": n_points}
    if n_points is None and isinstance(described, TinyRecursiveModel | TRMForward):
        del sizes["n_points"]
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} = {size!r}: a whole number of at least 1 is needed")
    if precision is not None:
        check_name("precision", precision, PRECISIONS)
    if reasons := described.watch(model):
        return backends.select_modules(described.backend, reasons)
    points: Any = n_points  # a number, where one is needed
    call = described.describe_call(batch_size, points, precision, replayed_training)
    return backends.explain(call)
