"""The forward that replaces that of a model of another code base, and the promise that it keeps.

``FastForward`` watches the model, and runs the model's own forward while that computes something
else; ``StackForward`` is the fast forward of models that have a stack of GPT-2's blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from looped_fast.dropin import checks, verify
from looped_fast.dropin.checks import UnsupportedModel
from looped_fast.dropin.structure import Architecture, Model, stack_weights
from looped_fast.model import ambient_precision
from looped_fast.ops import backends, forks
from looped_fast.ops.call import Call, LoopSettings, LoopTensors
from looped_fast.ops.graphed_loop import GraphedLoop
from looped_fast.ops.modules import Reasons, Watch, constant_in_graphs
from looped_fast.ops.reference import autocast

MAX_VERIFIED = 8  # states of a model; a forward that counts its calls has one more at each


class FastForward:
    """The forward that replaces that of a model of another code base.

    Args:
        model: the module whose forward it replaces.
        name: of the architecture, for messages.
        backend, attention, precision, graphed: see ``accelerate``.
    """

    called: Collection[str] = ()  # see ``Watch``

    def __init__(
        self,
        model: Model,
        name: str,
        backend: str,
        attention: str,
        precision: str | None,
        graphed: GraphedLoop,
    ) -> None:
        self.model = model
        self.name = name
        self.backend = backend
        self.attention = attention
        self.precision = precision
        self.graphed = graphed
        self.watch = Watch(self._judge, of_model=True, called=self.called)
        self._n_verified = 0

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own forward does, by the op."""
        raise NotImplementedError

    def unsupported(self, *args: Any, **kwargs: Any) -> Iterable[str]:
        """Say why a call with such arguments needs the model's own forward."""
        return ()

    def changes(self) -> Iterable[str]:
        """Say what would not run, or not be the same, in ``fast``: hooks, adapters, dropout."""
        raise NotImplementedError

    def differences(self, outputs_only: bool) -> Iterable[str]:
        """Say by numbers how ``fast`` differs; ``outputs_only`` for a model verified before."""
        raise NotImplementedError

    def describe_call(
        self,
        batch_size: int,
        n_points: int,
        precision: str | None = None,
        replayed_training: bool = False,
    ) -> Call:
        """Describe a call of the model for the choice of a backend; see ``explain_backend``."""
        raise NotImplementedError

    def verify(self) -> None:
        """Verify the model in both modes. Raises as ``accelerate`` does."""
        model = self.model
        if reasons := self.watch(model):
            if self._n_verified:  # no deviation that may go: it is another model
                raise UnsupportedModel(f"{type(model).__name__} as {self.name}", reasons)
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own forward does. Raises ValueError: see ``accelerate``."""
        if not torch.compiler.is_compiling():
            forks.keep_to_one_thread()
        by_modules = self.deviations() or self._unsupported(args, kwargs)
        with _autocast(next(self.model.parameters()).device.type, self.precision):
            if not by_modules:
                return self.fast(*args, **kwargs)
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
        if reasons := tuple(self.unsupported(*args, **kwargs)):
            self._say_once(reasons)
        return reasons

    @constant_in_graphs
    def _say_once(self, reasons: Reasons) -> None:
        backends.select_modules(self.backend, reasons)
        self.watch.say_once(f"{type(self.model).__name__} runs its own forward", reasons)

    def _judge(self, model: Model) -> Reasons:
        """Why the fast forward would not compute what ``model`` does; verifies it by numbers."""
        if found := tuple(self.changes()):
            return found
        if self._n_verified == MAX_VERIFIED:
            return (f"it was verified {MAX_VERIFIED} times and changed again; accelerate it anew",)
        self._n_verified += 1
        return tuple(self.differences(outputs_only=self._n_verified > 1))


class StackForward(FastForward):
    """The fast forward of a model that has a stack of GPT-2's blocks."""

    def __init__(self, model: Model, architecture: Architecture, *settings: Any) -> None:
        super().__init__(model, architecture.name, *settings)
        self.architecture = architecture

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own forward does, by the op."""
        return self.architecture.forward(self.model, self.loop, *args, **kwargs)

    def unsupported(self, *args: Any, **kwargs: Any) -> Iterable[str]:
        """Say why a call with such arguments needs the model's own forward."""
        return self.architecture.unsupported(self.model, *args, **kwargs)

    def changes(self) -> Iterable[str]:
        """Say what would not run, or not be the same, in ``fast``: hooks, adapters, dropout."""
        return checks.deviations(self.model, self.architecture)

    def differences(self, outputs_only: bool) -> Iterable[str]:
        """Say by numbers how ``fast`` differs; ``outputs_only`` for a model verified before."""
        model, architecture = self.model, self.architecture
        plain = StackForward(model, architecture, "reference", "auto", None, GraphedLoop("off"))
        if found := tuple(checks.unfit_parameters(plain.stack, plain.loop)):
            return found
        return verify.differences(model, architecture, plain.loop, outputs_only=outputs_only)

    @property
    def stack(self) -> Model:
        """The module that holds ``wpe``, ``h`` and ``ln_f``."""
        return self.architecture.stack(self.model)

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


def _autocast(device_type: str, precision: str | None) -> contextlib.AbstractContextManager:
    """Autocast to ``precision``, or the ambient autocast if it is None."""
    return contextlib.nullcontext() if precision is None else autocast(device_type, precision)
