"""The in-context learner: prompt assembly, read-in, the loop, read-out.

Parameters carry the official state-dict names (``_read_in.weight``,
``_backbone.transformer.h.0.attn.c_attn.weight``, ...), so checkpoints load in both directions.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.config import LAYER_NORM_EPS, PRECISIONS, ModelConfig, check_window
from looped_fast.ops import op
from looped_fast.ops.call import Call, LoopSettings, LoopTensors
from looped_fast.ops.graphed_loop import GraphedLoop
from looped_fast.ops.prompt import check_finite, read_in
from looped_fast.ops.reference import AUTOCAST_DTYPES


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)


class _Block(nn.Module):
    """Holds a block's parameters under their official names; ``ops.loop`` computes with them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = _Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = _MLP(config)

    def op_weights(self) -> list[Tensor]:
        """The block's parameters in the order of ``reference.Block``."""
        modules: Any = self._modules
        attn, mlp = modules["attn"]._modules, modules["mlp"]._modules
        return _weights_and_biases(
            modules["ln_1"], attn["c_attn"], attn["c_proj"],
            modules["ln_2"], mlp["c_fc"], mlp["c_proj"],
        )  # fmt: skip


def _weights_and_biases(*layers: Any) -> list[Tensor]:
    """Weight and bias of each layer.

    They come out of the dictionaries of nn.Module: as an attribute, each of the forty lookups in a
    call would take half a microsecond.
    """
    try:
        return [layer._parameters[name] for layer in layers for name in ("weight", "bias")]
    except KeyError:  # torch.nn.utils.parametrize computes a parameter when it is looked up
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]


class _Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                # official block_size is 2 * n_positions + 1
                "wpe": nn.Embedding(2 * config.n_positions + 1, config.n_embd),
                "h": nn.ModuleList(_Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS),
            }
        )
        self._init_weights(config)

    def _init_weights(self, config: ModelConfig) -> None:
        """GPT-2's initialisation, drawn in the official order (``nano_gpt.py``)."""
        std = config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer))

    def op_tensors(self) -> tuple[Tensor, list[Tensor]]:
        """All positions, [2 * n_positions + 1, D], and the ``weights`` of ``ops.loop``."""
        modules: Any = self.transformer._modules
        weights = [w for block in modules["h"] for w in block.op_weights()]
        return modules["wpe"].weight, weights + _weights_and_biases(modules["ln_f"])


class LoopedTransformer(nn.Module):
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
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: str = "auto",
        recompute: bool = False,
        attention: str = "auto",
        cuda_graphs: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.recompute = recompute
        self.attention = attention
        self._loop = GraphedLoop(cuda_graphs)
        self._read_in = nn.Linear(config.n_dims, config.n_embd)
        self._backbone = _Backbone(config)
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
        arguments = self._loop_arguments(xs, ys, n_loops, window, config.injection)
        return op.run_mse(*arguments, ys.unsqueeze(-1), n_supervised)

    def _loop_counts(self, n_loops: int | None, window: int | None) -> tuple[int, int]:
        n_loops = self.config.n_loops if n_loops is None else n_loops
        return n_loops, min(self.config.window, n_loops) if window is None else window

    def _predict(self, xs: Tensor, ys: Tensor, n_loops: int, window: int, injection: str) -> Tensor:
        arguments = self._loop_arguments(xs, ys, n_loops, window, injection)
        predictions = self._loop(*arguments)  # [W, B, n, n_outputs]
        if self.config.pred_type == "classification":
            return predictions
        return predictions.squeeze(-1)

    def _loop_arguments(
        self, xs: Tensor, ys: Tensor, n_loops: int, window: int, injection: str
    ) -> tuple[LoopTensors, LoopSettings]:
        """The arguments of ``op.run``."""
        check_window(n_loops, window)
        modules: Any = self._modules
        read_in_weights = _weights_and_biases(modules["_read_in"])
        dtype = read_in_weights[0].dtype
        xs, ys = op.cast_in_autocast(xs, dtype), op.cast_in_autocast(ys, dtype)
        self._check_prompt(xs, ys, read_in_weights[0])
        device = xs.device.type
        precision = ambient_precision(device)
        # Keep read-in (here) and read-out (in the op), a thousandth of the work, in full precision.
        with nullcontext() if precision == "fp32" else torch.autocast(device, enabled=False):
            embeddings = read_in(xs, ys, *read_in_weights, backend=self.backend)
        positions, weights = modules["_backbone"].op_tensors()
        read_out = _weights_and_biases(modules["_read_out"])
        tensors = LoopTensors(embeddings, positions[: embeddings.shape[1]], None, weights, read_out)
        return tensors, self._settings(n_loops, window, injection, precision)

    def _settings(self, n_loops: int, window: int, injection: str, precision: str) -> LoopSettings:
        return LoopSettings(
            n_heads=self.config.n_head,
            n_loops=n_loops,
            window=window,
            injection=injection,
            precision=precision,
            recompute=self.recompute,
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
        """Describe a call of this model for the choice of a backend; see ``explain_backend``."""
        config, weight = self.config, self._read_in.weight
        precision = precision or ambient_precision(weight.device.type)
        settings = self._settings(config.n_loops, config.window, config.injection, precision)
        sizes = batch_size, 2 * n_points, config.n_embd, config.n_layer
        replayed = replayed_training or self._loop.replays_on(weight.device)
        return Call(settings, weight.device, weight.dtype, *sizes, replayed, replayed_training)

    def _check_prompt(self, xs: Tensor, ys: Tensor, weight: Tensor) -> None:
        config = self.config
        if xs.dim() != 3 or xs.shape[-1] != config.n_dims:
            raise ValueError(
                f"xs has shape {tuple(xs.shape)}; [B, n, {config.n_dims}] is needed (n_dims)"
            )
        if ys.shape != xs.shape[:2]:
            raise ValueError(
                f"ys has shape {tuple(ys.shape)}; {tuple(xs.shape[:2])} is needed to match xs"
            )
        if xs.shape[1] > config.n_positions:
            raise ValueError(
                f"{xs.shape[1]} points exceed n_positions = {config.n_positions}; "
                f"shorten the prompt, or build the model with a larger n_positions"
            )
        for name, tensor in (("xs", xs), ("ys", ys)):
            if tensor.dtype != weight.dtype or tensor.device != weight.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, the model is {weight.dtype} "
                    f"on {weight.device}; convert with {name}.to(device, dtype)"
                )
        check_finite(xs, ys)


def ambient_precision(device_type: str) -> str:
    """The precision of the ambient ``torch.autocast``: bf16 or fp16; fp32 without one."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return "fp32"
    dtype = torch.get_autocast_dtype(device_type)
    for name in PRECISIONS:
        if AUTOCAST_DTYPES[name] == dtype:
            return name
    raise ValueError(f"autocast to {dtype} is not supported; use torch.bfloat16 or torch.float16")
