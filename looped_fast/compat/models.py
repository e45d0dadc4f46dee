"""The official models (``scripts/models.py``), on this library's op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from looped_fast.config import ModelConfig
from looped_fast.errors import check_name, unknown_name
from looped_fast.model import LoopedTransformer
from looped_fast.model.blocks import Backbone

FAMILIES = ("gpt2", "gpt2_loop", "gpt2_tying")
LOOP_FUNCS = {"z=f(x+z)": "add", "z=f(x*z)": "mul"}  # official name -> injection


class TransformerModelLooped(LoopedTransformer):
    """Official family ``gpt2_loop``."""

    def forward(  # type: ignore[override]
        self, xs: Tensor, ys: Tensor, n_loop_start: int, n_loops: int
    ) -> list[Tensor]:
        """Predictions after steps ``n_loop_start + 1 .. n_loops``; earlier ones have no gradient.

        xs: [B, n, d], ys: [B, n] -> list of [B, n], or of [B, n, 2] logits; empty if
        ``n_loop_start >= n_loops``. Raises ValueError as in ``LoopedTransformer.forward``.
        """
        window = n_loops - max(n_loop_start, 0)
        return list(super().forward(xs, ys, n_loops, window).unbind()) if window > 0 else []


class TransformerModel(LoopedTransformer):
    """Official family ``gpt2``: ``n_layer`` different blocks, run once."""

    def forward(  # type: ignore[override]
        self, xs: Tensor, ys: Tensor, add_inputs_embeds: bool = False
    ) -> Tensor:
        """Predictions; ``add_inputs_embeds`` adds the embedded prompt before every block.

        xs: [B, n, d], ys: [B, n] -> [B, n], or [B, n, 2] logits. Raises ValueError as in
        ``LoopedTransformer.forward``.
        """
        injection = "every_block" if add_inputs_embeds else "none"
        return self._predict(xs, ys, n_loops=1, window=1, injection=injection)[0]


class TransformerModelTying(LoopedTransformer):
    """Official family ``gpt2_tying``: one block, run ``n_layer`` times without injection."""

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        # The official class draws the weights of n_layer blocks, then of its shared one.
        super().__init__(replace(config, n_layer=config.n_loops), backend)
        self.config = config
        self._backbone = Backbone(config)

    def forward(  # type: ignore[override]
        self, xs: Tensor, ys: Tensor, add_inputs_embeds: bool
    ) -> Tensor:
        """Predictions. Like the official model, it ignores ``add_inputs_embeds``.

        xs: [B, n, d], ys: [B, n] -> [B, n]. Raises ValueError as in ``LoopedTransformer.forward``.
        """
        return super().forward(xs, ys)[-1]


def build_model(
    conf: Any, backend: str = "auto"
) -> TransformerModelLooped | TransformerModel | TransformerModelTying:
    """The model that the official ``build_model(conf)`` makes, on this library's op.

    Signature and return type of ``forward``, state-dict names and shapes, and the weights drawn
    after the same ``torch.manual_seed`` are the official ones.

    Args:
        conf: an object with attributes ``family, n_dims, n_positions, n_embd, n_layer, n_head``,
            and optionally ``pred_type`` (``regression`` by default, and always in the weight-tied
            model, as officially) and ``loop_func`` (by default ``z=f(x+z)``).
        backend: as in ``LoopedTransformer``.

    Raises:
        ValueError: an unknown family, loop_func or pred_type, or a size out of range.

    Source: official ``scripts/models.py``.
    """
    sizes = {name: getattr(conf, name) for name in ("n_dims", "n_positions", "n_embd", "n_head")}
    pred_type = getattr(conf, "pred_type", "regression")
    if conf.family == "gpt2_loop":
        loop_func = getattr(conf, "loop_func", "z=f(x+z)")
        check_name("loop_func", loop_func, LOOP_FUNCS)
        injection = LOOP_FUNCS[loop_func]
        config = ModelConfig(
            **sizes, n_layer=conf.n_layer, injection=injection, pred_type=pred_type
        )
        return TransformerModelLooped(config, backend)
    once = ModelConfig(**sizes, n_loops=1, window=1, injection="none")
    if conf.family == "gpt2":
        config = replace(once, n_layer=conf.n_layer, pred_type=pred_type)
        return TransformerModel(config, backend)
    if conf.family == "gpt2_tying":
        config = replace(once, n_loops=conf.n_layer, window=conf.n_layer)
        return TransformerModelTying(config, backend)
    raise unknown_name("family", conf.family, FAMILIES)
