"""The in-context learner: prompt assembly, read-in, the loop, read-out.

Parameters carry the official state-dict names (``_read_in.weight``,
``_backbone.transformer.h.0.attn.c_attn.weight``, ...), so checkpoints load in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.config import ModelConfig, check_whole, check_window
from looped_fast.model import prediction
from looped_fast.model.adaptive import Criterion, prediction_change
from looped_fast.model.blocks import Backbone, Part, weights_and_biases
from looped_fast.model.on_backend import OnBackend, ambient_precision
from looped_fast.model.prediction import Options
from looped_fast.model.prompts import check_prompt, check_tensors
from looped_fast.model.sharing import Shareable
from looped_fast.ops import op, reference
from looped_fast.ops.call import Call, LoopSettings, LoopTensors
from looped_fast.ops.modules import Reasons
from looped_fast.ops.prompt import read_in


class LoopedTransformer(Shareable, OnBackend):
    """One shared stack of blocks, run ``n_loops`` times, that predicts y from (x, y) prompts.

    Covers the looped, standard and weight-tied models of arXiv 2311.12424: see ``ModelConfig``.

        >>> config = ModelConfig(n_dims=5, n_positions=11, n_embd=64, n_head=4, n_loops=8, window=4)
        >>> model = LoopedTransformer(config)
        >>> predictions = model(torch.randn(3, 11, 5), torch.randn(3, 11))
        >>> predictions.shape
        torch.Size([4, 3, 11])

    Args:
        config: shapes and recurrence.
        backend: ``auto``, ``reference``, ``compiled``, ``cpu`` or ``triton``; see
            ``explain_backend``.
        recompute: save only states for the backward and recompute activations: slower, with less
            memory. ``loss`` on the ``cpu`` backend needs little memory either way.
        attention: implementation on the triton backend: ``auto``, ``flash_attn``, ``sdpa`` or
            ``triton``. See ``ops.loop``.
        cuda_graphs: ``auto``, ``on`` or ``off``: on a GPU, calls without gradient replay a CUDA
            graph from the third call with the same shapes; see ``graphed_loop.GraphedLoop``.

    Raises:
        TypeError: ``config`` is no ``ModelConfig``, or ``recompute`` is no bool.
        ValueError: an unknown backend, attention or cuda_graphs.

    Hooks, adapters and replaced modules inside the model are in force: while there are any, the
    model runs module by module in plain PyTorch, and says so once.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: str = "auto",
        recompute: bool = False,
        attention: str = "auto",
        cuda_graphs: str = "auto",
    ) -> None:
        super().__init__(config, ModelConfig, backend, recompute, attention, cuda_graphs)
        self._read_in = nn.Linear(config.n_dims, config.n_embd)
        self._backbone = Backbone(config)
        self._read_out = nn.Linear(config.n_embd, config.n_outputs)

    def forward(
        self, xs: Tensor, ys: Tensor, n_loops: int | None = None, window: int | None = None
    ) -> Tensor:
        """Predict y at every x position, after each of the last ``window`` loop steps.

        The prediction for x_i uses only (x_1, y_1) ... (x_{i-1}, y_{i-1}) and x_i. Matrix
        products run in bf16 or fp16 under ``torch.autocast``, else in the parameters' dtype.

        Args:
            xs: [B, n, d], in the parameters' dtype and on their device.
            ys: [B, n], with the same dtype and device.
            n_loops: loop steps b; ``config.n_loops`` by default. May exceed the trained b.
            window: last steps T that carry gradient; ``min(config.window, n_loops)`` by default.

        Returns:
            [window, B, n], or [window, B, n, 2] logits for classification.

        Raises:
            ValueError: shapes or dtypes that do not fit, n beyond ``n_positions``, a window
                outside 1..n_loops, or NaN or Inf in the prompt. (Values are checked on CPUs
                only: on a GPU the check would stall the stream.)
            TypeError: a prompt that is no tensor, or a count that is no whole number.
        """
        n_loops, window = self._loop_counts(n_loops, window)
        return self._predict(xs, ys, n_loops, window, self.config.injection)

    def loss(
        self,
        xs: Tensor,
        ys: Tensor,
        n_loops: int | None = None,
        window: int | None = None,
        n_supervised: int | None = None,
    ) -> Tensor:
        """Mean squared error of the predictions over loop steps, prompts and positions.

        Value and gradients are those of
        ``(self(xs, ys, n_loops, window)[-n_supervised:] - ys).square().mean()``. On the ``cpu``
        backend it needs far less memory: each thread runs a prompt's backward right after its
        forward, so it holds activations of one prompt at a time.

            >>> model = LoopedTransformer(ModelConfig(n_embd=64, n_head=4, n_loops=8, window=4))
            >>> model.loss(torch.randn(3, 11, 20), torch.randn(3, 11)).backward()

        Args:
            xs, ys, n_loops, window: as in ``forward``.
            n_supervised: last steps of the window that count; all of them by default.

        Returns:
            A scalar, [], once differentiable with respect to the parameters.

        Raises:
            ValueError: as in ``forward``; ``n_supervised`` is outside 1..window; or the model
                classifies.

        Source: official ``scripts/train.py``, ``train_step``.
        """
        config = self.config
        if config.pred_type == "classification":
            raise ValueError(
                "loss is the squared error of regression, but pred_type = 'classification': "
                "torch.nn.functional.cross_entropy takes those that a call of the model returns"
            )
        n_loops, window = self._loop_counts(n_loops, window)
        if by_modules := self.deviations():
            n_supervised = op.check_supervised(n_supervised, window)
            predictions = self._predict(xs, ys, n_loops, window, config.injection)
            return (predictions[-n_supervised:] - ys).square().mean()
        embeddings = self._embed(xs, ys, by_modules)
        arguments = self._loop_arguments(embeddings, None, n_loops, window, config.injection)
        return op.run_mse(*arguments, ys.unsqueeze(-1), n_supervised)

    def states(self, xs: Tensor, ys: Tensor, n_loops: int | None = None, window: int = 0) -> Tensor:
        """Return the state after every loop step.

            >>> model = LoopedTransformer(ModelConfig(n_embd=64, n_head=4, n_loops=8, window=4))
            >>> states = model.states(torch.randn(3, 11, 20), torch.randn(3, 11))
            >>> states.shape
            torch.Size([8, 3, 22, 64])
            >>> model.read_out(states).shape
            torch.Size([8, 3, 11])

        Args:
            xs, ys, n_loops: as in ``forward``.
            window: last steps that carry gradient; none by default. Memory for the backward grows
                with it.

        Returns:
            [n_loops, B, 2n, D]: state z after steps 1 .. n_loops.

        Raises:
            ValueError: as in ``forward``; or ``window`` is outside 0..n_loops.
        """
        n_loops = self.config.n_loops if n_loops is None else n_loops
        check_window(n_loops, window, at_least=0)
        start, parts = None, []
        embeddings = self.embed(xs, ys)
        if window < n_loops:
            with torch.no_grad():
                parts.append(self._run(embeddings.detach(), None, n_loops - window))
            start = parts[0][-1]
        if window > 0:
            parts.append(self._run(embeddings, start, window))
        return torch.cat(parts)

    def embed(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Embed the prompt: the input of every loop step.

        Args:
            xs, ys: as in ``forward``.

        Returns:
            [B, 2n, D]: embeddings of x_1, y_1, ..., x_n, y_n.

        Raises:
            ValueError: as in ``forward``.
        """
        return self._embed(xs, ys, self.deviations())

    def step(self, state: Tensor, embeddings: Tensor) -> Tensor:
        """Run one loop step, z -> z'. Differentiable in both arguments and the parameters.

            >>> model = LoopedTransformer(ModelConfig(n_embd=64, n_head=4, n_loops=8, window=4))
            >>> embeddings = model.embed(torch.randn(3, 11, 20), torch.randn(3, 11))
            >>> model.step(torch.zeros_like(embeddings), embeddings).shape
            torch.Size([3, 22, 64])

        Args:
            state: z, [B, 2n, D], such as one of ``states``.
            embeddings: of the prompt, [B, 2n, D], from ``embed``.

        Returns:
            The next state, [B, 2n, D].

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        return self._run(embeddings, state, 1)[0]

    def predict(
        self,
        xs: Tensor,
        ys: Tensor,
        queries: Tensor | None = None,
        *,
        seen: Tensor | None = None,
        n_loops: int | None = None,
        window: int | None = None,
        tolerance: float | None = None,
        max_loops: int | None = None,
        criterion: Criterion = prediction_change,
        anderson: int = 0,
    ) -> Any:
        """Predict without gradient: many queries for one set of examples, or loops until enough.

            >>> model = LoopedTransformer(ModelConfig(n_embd=64, n_head=4, n_loops=8, window=4))
            >>> xs, ys, queries = (torch.randn(3, *shape) for shape in ((10, 20), (10,), (99, 20)))
            >>> model.predict(xs, ys, queries).shape
            torch.Size([3, 99])
            >>> predictions, n_loops = model.predict(xs, ys, queries, tolerance=1e-3)
            >>> predictions.shape, n_loops.shape
            (torch.Size([3, 99]), torch.Size([3]))

        The examples run once for all queries: attention is causal, so no query changes them. Each
        query is predicted as if it alone followed the examples that it sees.

        Args:
            xs, ys: the prompt, as in ``forward``; with queries the examples, maybe none (n = 0).
            queries: [B, m, d], whose y are predicted; None to predict at every position of xs.
            seen: [m] int64, how many of the examples (the first ones) each query sees; all n by
                default.
            n_loops: loop steps b; ``config.n_loops`` by default.
            window: predict after each of the last ``window`` steps; None for the last one alone.
            tolerance: stop each prompt after the step at which the criterion is below it, the
                second step at the earliest.
            max_loops: most steps with a tolerance; ``config.n_loops`` by default.
            criterion: (snapshot, snapshot of the step before) -> [B]; one of ``model.adaptive``,
                or your own.
            anderson: depth of Anderson acceleration; 0 for none. docs/adaptive.md says where it
                saves steps, and where it hurts.

        Returns:
            [B, m] with queries, else [B, n]; with a window [window, B, m] or [window, B, n]. Logits
            have a last axis of 2. With a tolerance an ``AdaptivePrediction``: predictions, and the
            steps that each prompt ran.

        Raises:
            ValueError: as in ``forward``; n + 1 points exceed ``n_positions``; options that exclude
                each other; or queries with a tolerance or acceleration while hooks or adapters
                make the model run module by module.
            TypeError: as in ``forward``.
        """
        options = Options(n_loops, window, tolerance, max_loops, criterion, anderson)
        return prediction.predict(self, xs, ys, queries, seen, options)

    def read_out(self, states: Tensor) -> Tensor:
        """Read predictions out of states.

        Args:
            states: [..., 2n, D], from ``states`` or ``step``.

        Returns:
            [..., n], or [..., n, 2] logits for classification, as in ``forward``.
        """
        with reference.autocast(states.device.type, "fp32"):
            return self._squeeze(self._read_out(states)[..., ::2, :])

    def _loop_counts(self, n_loops: int | None, window: int | None) -> tuple[int, int]:
        n_loops = self.config.n_loops if n_loops is None else n_loops
        if window is None:
            check_whole("n_loops", n_loops)
            window = min(self.config.window, n_loops)
        return n_loops, window

    def _embed(self, xs: Tensor, ys: Tensor, by_modules: Reasons) -> Tensor:
        check_tensors(xs=xs, ys=ys)
        weights = None if by_modules else weights_and_biases(self._modules["_read_in"])
        dtype = (weights[0] if weights else next(self.parameters())).dtype
        xs, ys = op.cast_in_autocast(xs, dtype), op.cast_in_autocast(ys, dtype)
        check_prompt(self.config, xs, ys, weights[0] if weights else None)
        # Keep read-in (here) and read-out (in the op), a thousandth of the work, in full precision.
        with reference.autocast(xs.device.type, "fp32"):
            if weights is None:
                return self._read_in(reference.interleave(xs, ys))
            return read_in(xs, ys, *weights, backend=self.backend)

    def _predict(self, xs: Tensor, ys: Tensor, n_loops: int, window: int, injection: str) -> Tensor:
        check_window(n_loops, window)
        by_modules = self.deviations()
        embeddings = self._embed(xs, ys, by_modules)
        if not by_modules:
            arguments = self._loop_arguments(embeddings, None, n_loops, window, injection)
            return self._squeeze(self.graphed(*arguments))  # [W, B, n, n_outputs]
        states = self._run_modules(embeddings, None, n_loops, window, injection)
        return torch.stack([self.read_out(state) for state in states])

    def _squeeze(self, outputs: Tensor) -> Tensor:
        return outputs if self.config.pred_type == "classification" else outputs.squeeze(-1)

    def _run(
        self, embeddings: Tensor, state: Tensor | None, n_loops: int, seen: Tensor | None = None
    ) -> Tensor:
        """Run loop steps that all carry gradient; return the states after each."""
        arguments = embeddings, state, n_loops, n_loops, self.config.injection
        if self.deviations():
            return self._run_modules(*arguments)
        tensors, settings = self._loop_arguments(*arguments, seen)
        return self.graphed(tensors._replace(read_out=[]), settings)

    def _loop_arguments(
        self,
        embeddings: Tensor,
        state: Tensor | None,
        n_loops: int,
        window: int,
        injection: str,
        seen: Tensor | None = None,
    ) -> tuple[LoopTensors, LoopSettings]:
        """The arguments of ``op.run``; a query follows the tokens that it has ``seen``."""
        modules: Any = self._modules
        positions, weights = modules["_backbone"].op_tensors()
        read_out = weights_and_biases(modules["_read_out"])
        S = embeddings.shape[1]
        if seen is None:
            positions = positions[:S]
        else:
            positions = torch.cat((positions[: S - len(seen)], positions[seen]))
        tensors = LoopTensors(embeddings, positions, state, weights, read_out, seen)
        return tensors, self._settings(n_loops, window, injection, embeddings.device.type)

    def _run_modules(
        self, embeddings: Tensor, state: Tensor | None, n_loops: int, window: int, injection: str
    ) -> Tensor:
        """Run ``ops.loop`` by calling modules: the states of the window, [W, B, 2n, D]."""

        def step(state: Tensor, embeddings: Tensor) -> Tensor:
            inputs = reference.inject(state, embeddings, injection)
            added = (embeddings,) if injection == "every_block" else ()
            return self._backbone(inputs, *added)

        settings = self._settings(n_loops, window, injection, embeddings.device.type)
        if state is None:
            state = reference.initial_state(embeddings, injection)
        return reference.iterate(step, state, (embeddings,), settings)

    def _settings(self, n_loops: int, window: int, injection: str, device: str) -> LoopSettings:
        return LoopSettings(
            n_heads=self.config.n_head,
            n_loops=n_loops,
            window=window,
            injection=injection,
            precision=self.precision or ambient_precision(device),
            recompute=self.recompute,
            backend=self.backend,
            attention=self.attention,
        )

    def unfit(self) -> Iterable[str]:
        """Say of each module that the op stands in for why it would not compute the same."""
        return filter(None, (part.unfit() for part in self._parts()))

    def _parts(self) -> list[Part]:
        D = self.config.n_embd
        parts = [
            Part("_read_in", self._read_in, nn.Linear, (D, self.config.n_dims)),
            Part("_backbone", self._backbone, Backbone),
            Part("_read_out", self._read_out, nn.Linear, (self.config.n_outputs, D)),
        ]
        if type(self._backbone) is Backbone:
            parts += [p._replace(name=f"_backbone.{p.name}") for p in self._backbone.parts(D)]
        return parts

    def describe_call(
        self,
        batch_size: int,
        n_points: int,
        precision: str | None = None,
        replayed_training: bool = False,
    ) -> Call:
        """Describe a call of this model for the choice of a backend; see ``explain_backend``."""
        config, weight = self.config, next(self.parameters())
        settings = self._settings(
            config.n_loops, config.window, config.injection, weight.device.type
        )
        if precision is not None:
            settings = settings._replace(precision=precision)
        sizes = batch_size, 2 * n_points, config.n_embd, config.n_layer
        replayed = replayed_training or self.graphed.replays_on(weight.device)
        return Call(settings, weight.device, weight.dtype, *sizes, replayed, replayed_training)
