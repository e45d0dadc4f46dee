"""Speed up a model of the official code, of nanoGPT, or of this package, in place.

``accelerate`` puts a faster forward on one instance; parameters, state dict, class and modules
stay what they are, so checkpoints and optimizers made before or after keep working. ``restore``
removes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from looped_fast.config import ATTENTION, BACKENDS, PRECISIONS
from looped_fast.dropin import architectures, verify
from looped_fast.dropin.architectures import ARCHITECTURES, Architecture, Model
from looped_fast.errors import check_name
from looped_fast.model import LoopedTransformer, ambient_precision
from looped_fast.ops.call import Call, LoopSettings, LoopTensors
from looped_fast.ops.graphed_loop import GraphedLoop
from looped_fast.ops.reference import AUTOCAST_DTYPES

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class UnsupportedModel(ValueError):
    """A model that can't be accelerated.

    Attributes:
        reasons: a string for each obstacle; the message lists them all.
    """

    def __init__(self, model_name: str, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        super().__init__(model_name, self.reasons)

    def __str__(self) -> str:
        return "\n  - ".join([f"can't accelerate {self.args[0]}:", *self.reasons])


def accelerate(
    model: AnyModule,
    backend: str = "auto",
    precision: str | None = None,
    cuda_graphs: str = "auto",
    attention: str = "auto",
) -> AnyModule:
    """Make ``model`` run its loop as one fast op, in training and inference. Changes it in place.

    Supports the official ``TransformerModelLooped``, ``TransformerModel`` and
    ``TransformerModelTying``, nanoGPT's ``GPT`` (with GELU in its tanh form), and
    ``LoopedTransformer``: recognised by their attributes, and verified by their results on tiny
    random inputs (see ``looped_fast.dropin.verify``). A second call changes the settings.

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
        UnsupportedModel: with every reason. A later call of the model raises it too, if the model
            is then in a mode that computes something else (dropout and the like), or has hooks
            that would not run.
        ValueError: an unknown backend, precision, cuda_graphs or attention.
    """
    check_name("backend", backend, ("auto", *BACKENDS))
    check_name("attention", attention, ("auto", *ATTENTION))
    if precision is not None:
        check_name("precision", precision, PRECISIONS)
    graphed = GraphedLoop(cuda_graphs)
    replacement: FastForward | _OwnForward
    if isinstance(model, LoopedTransformer):
        replacement = _OwnForward(model, backend, attention, precision, graphed)
    else:
        architecture, unfit = _supported(model)
        replacement = FastForward(
            model, architecture, backend, attention, precision, graphed, unfit
        )
    if replaced(model) is not None:
        restore(model)
    replacement.install()
    return model


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


class FastForward:
    """The forward that replaces that of a model of another code base."""

    def __init__(
        self,
        model: Model,
        architecture: Architecture,
        backend: str,
        attention: str,
        precision: str | None,
        graphed: GraphedLoop,
        unfit: Mapping[bool, list[str]] | None = None,
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.unfit = unfit or {}  # model.training -> reasons against that mode
        self.backend = backend
        self.attention = attention
        self.precision = precision
        self.graphed = graphed

    def install(self) -> None:
        """Shadow the forward of the model's class."""
        self.model.forward = self

    def remove(self) -> None:
        """Undo ``install``."""
        del self.model.forward

    @property
    def stack(self) -> Model:
        """The module that holds ``wpe``, ``h`` and ``ln_f``."""
        return self.architecture.stack(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own forward does. Raises UnsupportedModel: see ``accelerate``."""
        reasons = [
            *self.unfit.get(self.model.training, ()), *_dropout(self.model), *_hooks(self.stack)
        ]  # fmt: skip
        if reasons:
            raise UnsupportedModel(type(self.model).__name__, reasons)
        with _autocast(self.stack.wpe.weight.device.type, self.precision):
            return self.architecture.forward(self.model, self.loop, *args, **kwargs)

    def loop(
        self,
        embeddings: Tensor,
        *,
        n_loops: int,
        window: int,
        injection: str,
        read_out: Sequence[Tensor] = (),
    ) -> Tensor:
        """Run ``ops.loop`` on the model's current parameters: see ``architectures.Loop``."""
        stack, precision = self.stack, ambient_precision(embeddings.device.type)
        positions = stack.wpe.weight[: embeddings.shape[1]]
        weights = architectures.stack_weights(stack)
        tensors = LoopTensors(embeddings, positions, None, weights, list(read_out))
        return self.graphed(tensors, self._settings(n_loops, window, injection, precision))

    def _settings(self, n_loops: int, window: int, injection: str, precision: str) -> LoopSettings:
        return LoopSettings(
            n_heads=self.stack.h[0].attn.n_head,
            n_loops=n_loops,
            window=window,
            injection=injection,
            precision=precision,
            backend=self.backend,
            attention=self.attention,
        )

    def describe_call(
        self,
        batch_size: int,
        n_points: int,
        precision: str | None = None,
        replayed_training: bool = False,
    ) -> Call:
        """Describe a call of the model for the choice of a backend; see ``explain_backend``."""
        stack, weight = self.stack, self.stack.wpe.weight
        # The loop count, an argument of the model's calls, does not affect the selection.
        precision = precision or ambient_precision(weight.device.type)
        seq_len = self.architecture.tokens_per_point * n_points
        sizes = batch_size, seq_len, weight.shape[1], len(stack.h)
        settings = self._settings(1, 1, "none", precision)
        replayed = replayed_training or self.graphed.replays_on(weight.device)
        return Call(settings, weight.device, weight.dtype, *sizes, replayed, replayed_training)


class _OwnForward:
    """Apply settings to ``LoopedTransformer.forward``, which is fast already."""

    def __init__(
        self,
        model: LoopedTransformer,
        backend: str,
        attention: str,
        precision: str | None,
        graphed: GraphedLoop,
    ) -> None:
        self.model = model
        self.backend = backend
        self.attention = attention
        self.precision = precision
        self.graphed = graphed

    def install(self) -> None:
        model = self.model
        self.original = model.backend, model.attention, model._loop
        model.backend, model.attention, model._loop = self.backend, self.attention, self.graphed
        self.model.forward = self  # type: ignore[method-assign]

    def remove(self) -> None:
        model = self.model
        model.backend, model.attention, model._loop = self.original
        del self.model.forward

    def __call__(self, xs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _autocast(xs.device.type, self.precision):
            return type(self.model).forward(self.model, xs, *args, **kwargs)


def replaced(model: nn.Module) -> FastForward | _OwnForward | None:
    """The forward that ``accelerate`` installed, or None."""
    forward = vars(model).get("forward")
    return forward if isinstance(forward, FastForward | _OwnForward) else None


def _autocast(device_type: str, precision: str | None) -> contextlib.AbstractContextManager:
    """Autocast to ``precision``, or the ambient autocast if it is None."""
    if precision is None:
        return contextlib.nullcontext()
    dtype = AUTOCAST_DTYPES[precision]
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def _supported(model: nn.Module) -> tuple[Architecture, dict[bool, list[str]]]:
    """The architecture of ``model``, verified to compute the same in its current mode.

    Returns:
        The architecture, and ``{not model.training: reasons against the model in that mode}``.

    Raises:
        UnsupportedModel: with the reasons of cheap checks or, if those pass, of numerical ones.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(name, ["it is compiled; accelerate the model, then compile it"])
    if "forward" in vars(model) and replaced(model) is None:
        raise UnsupportedModel(name, ["its forward was replaced on this instance"])
    architecture = architectures.recognise(model)
    if architecture is None:
        known = ", ".join(a.name for a in ARCHITECTURES)
        raise UnsupportedModel(name, [f"it has the structure of none of: {known}"])
    reasons = list(_missing(model, architecture))
    if reasons:
        raise UnsupportedModel(f"{name} as {architecture.name}", reasons)
    stack = architecture.stack(model)
    on_reference = FastForward(model, architecture, "reference", "auto", "fp32", GraphedLoop("off"))
    reasons = [*_unfit_parameters(stack, on_reference), *_dropout(model), *_hooks(stack)]
    reasons = reasons or verify.differences(model, architecture, on_reference.loop)
    if reasons:
        raise UnsupportedModel(f"{name} as {architecture.name}", reasons)
    other = not model.training
    with verify.in_mode(model, other):
        found = verify.differences(model, architecture, on_reference.loop, outputs_only=True)
    when = "while training" if other else "in eval mode"
    return architecture, {other: [f"{when}, {reason}" for reason in found]}


def _missing(model: Model, architecture: Architecture) -> Iterator[str]:
    """Attributes that the fast forward reads and ``model`` lacks."""
    block_paths = ("ln_1.weight", "attn.c_attn.weight", "attn.c_proj.weight", "attn.n_head",
                   "ln_2.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # fmt: skip
    for path in architecture.needs:
        if not architectures.has(model, path):
            yield f"it has no {path}"
    stack = architecture.stack(model)
    for path in ("wpe.weight", "h", "ln_f.weight"):
        if not architectures.has(stack, path):
            yield f"its stack has no {path}"
    blocks = list(getattr(stack, "h", []))
    if not blocks:
        yield "its stack h holds no blocks"
    for i, block in enumerate(blocks):
        for path in block_paths:
            if not architectures.has(block, path):
                yield f"h.{i} has no {path}"


def _unfit_parameters(stack: Model, forward: FastForward) -> Iterator[str]:
    """Dtypes and shapes that the op refuses."""
    wpe = stack.wpe.weight
    if wpe.dtype not in (torch.float32, torch.float64):
        yield (
            f"its parameters are {wpe.dtype}; keep them in torch.float32, and choose the "
            f"precision of matrix products by torch.autocast, or precision='bf16'"
        )
        return
    embeddings = wpe.new_zeros(1, 1, wpe.shape[1])
    try:
        with torch.no_grad(), torch.autocast(wpe.device.type, enabled=False):
            forward.loop(embeddings, n_loops=1, window=1, injection="none")
    except ValueError as error:
        yield str(error)


def _dropout(model: Model) -> Iterator[str]:
    """Active dropout, which the fast forward does not compute."""
    for name, module in model.named_modules():
        p = verify.dropout_of(module)
        if module.training and p > 0:
            yield f"{name} drops out with p = {p} while training; set it to 0, or call eval()"


def _hooks(stack: Model) -> Iterator[str]:
    """Hooks on modules that the fast forward does not call."""
    for name, module in architectures.replaced_modules(stack):
        for kind in architectures.hooks_of(module):
            yield f"{kind} of {name or 'the stack'} would not run; remove them"
