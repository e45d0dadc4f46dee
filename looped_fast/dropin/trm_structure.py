"""The structure of the public Tiny Recursive Model, and what the op takes of it.

Source: SamsungSAILMontreal/TinyRecursiveModels, ``models/recursive_reasoning/trm.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from looped_fast.dropin.structure import Model, has
from looped_fast.ops.block import TRM, Block

NAME = "TinyRecursiveReasoningModel_ACTV1"
_MARKERS = ("L_level.layers", "embed_tokens", "H_init", "L_init", "_input_embeddings")
_NEEDS = ("lm_head", "q_head", "puzzle_emb_len", "empty_carry", "config.seq_len",
          "config.H_cycles", "config.L_cycles")  # fmt: skip
_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_OF_BLOCK = (*(f"{path}.weight" for path in _LINEARS), "self_attn.num_heads", "norm_eps")


def inner_of(model: Model) -> Model | None:
    """The module whose forward recurses, ``model`` or its ``inner``, if it is a TRM's."""
    for module in (model, getattr(model, "inner", None)):
        if all(has(module, path) for path in _MARKERS) and not has(module, "H_level"):
            return module
    return None


def missing(model: Model) -> Iterator[str]:
    """Attributes that the fast forward reads and ``model`` lacks."""
    if getattr(model.config, "mlp_t", False):
        yield (
            "mlp_t = True: its blocks mix tokens by an MLP, which the op does not have; train with "
            "mlp_t=False, for attention, or run the model as it is"
        )
        return
    yield from (f"it has no {path}" for path in _NEEDS if not has(model, path))
    if not len(model.L_level.layers):
        yield "L_level.layers holds no blocks"
    for i, layer in enumerate(model.L_level.layers):
        yield from (f"L_level.layers.{i} has no {p}" for p in _OF_BLOCK if not has(layer, p))


def block_weights(layer: Model) -> list[Tensor]:
    """A block's parameters in the order of the loop op."""
    return [layer.get_submodule(path).weight for path in _LINEARS]


def block_settings(model: Model) -> Block:
    """Settings of the blocks for the op."""
    layer = model.L_level.layers[0]
    return TRM._replace(
        norm_eps=layer.norm_eps,
        mlp_hidden=layer.mlp.down_proj.weight.shape[1],
        positions="rotary" if hasattr(model, "rotary_emb") else "none",
    )
