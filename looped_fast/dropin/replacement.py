"""Speed up a model of another code base, or of this package, in place.

``accelerate`` puts a faster forward on one instance; parameters, state dict, class and modules
stay what they are, so checkpoints and optimizers made before or after keep working. ``restore``
removes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from looped_fast.config import ATTENTION, BACKENDS, PRECISIONS
from looped_fast.dropin import checks, verify
from looped_fast.dropin.checks import UnsupportedModel
from looped_fast.dropin.structure import Architecture, Model, stack_weights
from looped_fast.errors import check_name
from looped_fast.model import LoopedTransformer, ambient_precision
from looped_fast.ops import backends, forks
from looped_fast.ops.call import Call, LoopSettings, LoopTensors
from looped_fast.ops.graphed_loop import GraphedLoop
from looped_fast.ops.modules import Reasons, Watch, constant_in_graphs
from looped_fast.ops.reference import autocast

MAX_VERIFIED = 8  # states of a model; a forward that counts its calls has one more at each
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
    ``TransformerModel`` of Garg et al., Hugging Face's ``GPT2Model``, and ``LoopedTransformer``:
    recognised by their attributes, and verified by their results on tiny random inputs (see
    ``looped_fast.dropin.verify``). A second call changes the settings.

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
    before = replaced(model)
    replacement: FastForward | OwnSettings
    if isinstance(model, LoopedTransformer):
        replacement = OwnSettings(model, backend, attention, precision, graphed)
    else:
        architecture = checks.recognise(model, is_accelerated=before is not None)
        replacement = FastForward(model, architecture, backend, attention, precision, graphed)
        replacement.verify()
    if before is not None:
        before.remove()
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
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.backend = backend
        self.attention = attention
        self.precision = precision
        self.graphed = graphed
        self.watch = Watch(self._judge, of_model=True)
        self._n_verified = 0

    def verify(self) -> None:
        """Verify the model in both modes. Raises as ``accelerate`` does."""
        model = self.model
        if reasons := self.watch(model):
            if self._n_verified:  # no deviation that may go: it is another model
                name = f"{type(model).__name__} as {self.architecture.name}"
                raise UnsupportedModel(name, reasons)
        else:
            with checks.in_mode(model, not model.training):
                self.watch(model)
        self.deviations()

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
        """Return what the model's own forward does. Raises ValueError: see ``accelerate``."""
        if not torch.compiler.is_compiling():
            forks.keep_to_one_thread()
        by_modules = self.deviations() or self._unsupported(args, kwargs)
        with _autocast(next(self.model.parameters()).device.type, self.precision):
            if not by_modules:
                return self.architecture.forward(self.model, self.loop, *args, **kwargs)
            result = type(self.model).forward(self.model, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.watch.overlook_changes(self.model)
        return result

    @constant_in_graphs
    def deviations(self) -> Reasons:
        """Say why the model's own forward runs now; empty if the fast one does.

        Raises:
            ValueError: it would, but ``backend`` forces another than ``reference``.
        """
        if reasons := self.watch(self.model):
            self._say_once(reasons)
        return reasons

    def _unsupported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reasons:
        """As ``deviations``, for what the arguments of a call ask for."""
        if reasons := tuple(self.architecture.unsupported(self.model, *args, **kwargs)):
            self._say_once(reasons)
        return reasons

    @constant_in_graphs
    def _say_once(self, reasons: Reasons) -> None:
        backends.select_modules(self.backend, reasons)
        self.watch.say_once(f"{type(self.model).__name__} runs its own forward", reasons)

    def _judge(self, model: Model) -> Reasons:
        """Why the fast forward would not compute what ``model`` does; verifies it by numbers."""
        if found := tuple(checks.deviations(model, self.architecture)):
            return found
        if self._n_verified == MAX_VERIFIED:
            return (f"it was verified {MAX_VERIFIED} times and changed again; accelerate it anew",)
        self._n_verified += 1
        plain = FastForward(model, self.architecture, "reference", "auto", None, GraphedLoop("off"))
        if found := tuple(checks.unfit_parameters(plain.stack, plain.loop)):
            return found
        again = self._n_verified > 1
        return tuple(verify.differences(model, self.architecture, plain.loop, outputs_only=again))

    def loop(
        self,
        embeddings: Tensor,
        *,
        n_loops: int,
        window: int,
        injection: str,
        read_out: Sequence[Tensor] = (),
    ) -> Tensor:
        """Run ``ops.loop`` on the model's current parameters: see ``structure.Loop``."""
        stack, precision = self.stack, ambient_precision(embeddings.device.type)
        positions = stack.wpe.weight[: embeddings.shape[1]]
        weights = stack_weights(stack)
        tensors = LoopTensors(embeddings, positions, None, weights, list(read_out))
        return self.graphed(tensors, self._settings(n_loops, window, injection, precision))

    def _settings(self, n_loops: int, window: int, injection: str, precision: str) -> LoopSettings:
        return LoopSettings(
            n_heads=self.architecture.n_heads(self.model),
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
        precision = precision or self.precision or ambient_precision(weight.device.type)
        seq_len = self.architecture.tokens_per_point * n_points
        sizes = batch_size, seq_len, weight.shape[1], len(stack.h)
        settings = self._settings(1, 1, "none", precision)
        replayed = replayed_training or self.graphed.replays_on(weight.device)
        return Call(settings, weight.device, weight.dtype, *sizes, replayed, replayed_training)


class OwnSettings:
    """Settings of ``accelerate`` for a ``LoopedTransformer``, which is fast already."""

    def __init__(
        self,
        model: LoopedTransformer,
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
    if isinstance(model, LoopedTransformer):
        return vars(model).get("accelerated")
    forward = vars(model).get("forward")
    return forward if isinstance(forward, FastForward) else None


def _autocast(device_type: str, precision: str | None) -> contextlib.AbstractContextManager:
    """Autocast to ``precision``, or the ambient autocast if it is None."""
    return contextlib.nullcontext() if precision is None else autocast(device_type, precision)
