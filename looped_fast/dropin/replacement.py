"""Speed up a model of another code base, or of this package, in place.

``accelerate`` puts a faster forward on one instance; parameters, state dict, class and modules
stay what they are, so checkpoints and optimizers made before or after keep working. ``restore``
removes it.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from looped_fast.config import ATTENTION, BACKENDS, PRECISIONS
from looped_fast.dropin import checks
from looped_fast.dropin.checks import UnsupportedModel
from looped_fast.dropin.forward import FastForward, StackForward
from looped_fast.dropin.trm import TRMForward
from looped_fast.dropin.trm_structure import NAME, inner_of, missing
from looped_fast.errors import check_name
from looped_fast.model import LoopedTransformer, TinyRecursiveModel
from looped_fast.ops.graphed_loop import GraphedLoop

OwnModel = LoopedTransformer | TinyRecursiveModel
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def accelerate(
    model: AnyModule,
    backend: str = "auto",
    precision: str | None = None,
    cuda_graphs: str = "auto",
    attention: str = "auto",
) -> AnyModule:
    """Make ``model`` run its loop as one fast op, in training and inference. Changes it in place.

    Supports the official ``TransformerModelLooped``, ``TransformerModel`` and
    ``TransformerModelTying``, nanoGPT's ``GPT`` (with GELU in its tanh form), the
    ``TransformerModel`` of Garg et al., Hugging Face's ``GPT2Model``, the public
    ``TinyRecursiveReasoningModel_ACTV1`` and its ``inner``, ``LoopedTransformer`` and
    ``TinyRecursiveModel``: recognised by their attributes, and verified by their results on tiny
    random inputs (see ``looped_fast.dropin.verify``). A second call changes the settings.

    Results never change. While the model has hooks or adapters inside, or replaced modules, or
    drops out, or a setting of it was changed so that it computes something else, its own forward
    runs, and a warning says so once; ``explain_backend`` names the module. The same holds for a
    call of ``GPT2Model`` that asks for more than the last hidden state of tokens that all count:
    a cache, attention weights, a mask with padding.

    Args:
        model: a module with parameters in float32, or in float64 for the reference backend.
        backend: ``auto``, or ``reference``, ``compiled``, ``cpu`` or ``triton`` to force it.
        precision: operands of matrix products: ``fp32``, ``bf16``, ``fp16``; None follows
            ``torch.autocast`` around the call.
        cuda_graphs: ``auto``, ``on`` or ``off``: on a GPU, calls without gradient replay a CUDA
            graph from the third call with the same shapes; see ``graphed_loop.GraphedLoop``.
        attention: implementation on the triton backend: ``auto``, ``triton``, ``flash_attn`` or
            ``sdpa``; see ``ops.loop``.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModel: the model has another structure, or computes something else; with every
            reason.
        ValueError: an unknown backend, precision, cuda_graphs or attention. A call of the model
            raises it where its own forward would have to run, but ``backend`` forces another.
    """
    check_name("backend", backend, ("auto", *BACKENDS))
    check_name("attention", attention, ("auto", *ATTENTION))
    if precision is not None:
        check_name("precision", precision, PRECISIONS)
    graphed = GraphedLoop(cuda_graphs)
    settings = backend, attention, precision, graphed
    before = replaced(model)
    replacement: FastForward | OwnSettings
    if isinstance(model, OwnModel):
        replacement = OwnSettings(model, *settings)
    else:
        replacement = _fast_forward(model, before is not None, *settings)
        replacement.verify()
    if before is not None:
        before.remove()
    replacement.install()
    return model


def _fast_forward(model: nn.Module, is_accelerated: bool, *settings: Any) -> FastForward:
    """The fast forward for a model of another code base, not verified yet."""
    checks.check_untouched(model, is_accelerated)
    inner = inner_of(model)
    if inner is None:
        return StackForward(model, checks.recognise(model), *settings)
    checks.check_untouched(inner, is_accelerated)
    if reasons := list(missing(inner)):
        raise UnsupportedModel(f"{type(model).__name__} as {NAME}", reasons)
    return TRMForward(inner, *settings)


def restore(model: AnyModule) -> AnyModule:
    """Undo ``accelerate``, in place, and return ``model``.

    Raises:
        ValueError: the model is not accelerated.
    """
    replacement = replaced(model)
    if replacement is None:
        raise ValueError(f"this {type(model).__name__} is not accelerated; nothing to restore")
    replacement.remove()
    return model


class OwnSettings:
    """Settings of ``accelerate`` for a model of this package, which is fast already."""

    def __init__(
        self,
        model: OwnModel,
        backend: str,
        attention: str,
        precision: str | None,
        graphed: GraphedLoop,
    ) -> None:
        self.model = model
        self.settings = backend, attention, precision, graphed

    def install(self) -> None:
        """Set them, and keep the model's own for ``remove``."""
        model = self.model
        self.original = model.backend, model.attention, model.precision, model.graphed
        model.backend, model.attention, model.precision, model.graphed = self.settings
        vars(model)["accelerated"] = self

    def remove(self) -> None:
        """Undo ``install``."""
        model = self.model
        model.backend, model.attention, model.precision, model.graphed = self.original
        del vars(model)["accelerated"]


def replaced(model: nn.Module) -> FastForward | OwnSettings | None:
    """What ``accelerate`` installed, or None."""
    if isinstance(model, OwnModel):
        return vars(model).get("accelerated")
    forward = vars(inner_of(model) or model).get("forward")
    return forward if isinstance(forward, FastForward) else None
