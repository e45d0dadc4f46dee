"""Hugging Face's ``GPT2Model``, and the model of Garg et al., which puts a prompt through one.

Sources: transformers' ``models/gpt2/modeling_gpt2.py``; ``src/models.py`` of
dtsip/in-context-learning (Garg, Tsipras, Liang and Valiant, arXiv 2208.01066). transformers is
never imported here unless a model of it exists already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.dropin.structure import Architecture, Blocks, Example, Loop, Model, embed, predict
from looped_fast.dropin.structure import prompt as random_prompt

_ONCE = {"n_loops": 1, "window": 1, "injection": "none"}


def garg_forward(model: Model, loop: Loop, xs: Tensor, ys: Tensor, inds: Any = None) -> Tensor:
    """``TransformerModel.forward`` of Garg et al.: predictions at the points ``inds``.

    xs: [B, n, d], ys: [B, n]; inds: whole numbers in 0..n-1, all points by default -> [B, n_inds].
    """
    if inds is not None:
        inds = torch.as_tensor(inds)
        if max(inds) >= ys.shape[1] or min(inds) < 0:
            raise ValueError("inds contain indices where xs and ys are not defined")
    predictions = predict(model._read_out, loop, embed(model, xs, ys), _ONCE)[0, ..., 0]
    return predictions if inds is None else predictions[:, inds]


def gpt2_forward(
    model: Model,
    loop: Loop,
    input_ids: Tensor | None = None,
    *_: None,
    inputs_embeds: Tensor | None = None,
    **__: Any,
) -> Any:
    """``GPT2Model.forward`` for calls that are not ``gpt2_unsupported``.

    input_ids: [B, S] int64, or inputs_embeds: [B, S, D] -> transformers'
    ``BaseModelOutputWithPastAndCrossAttentions`` with ``last_hidden_state`` [B, S, D].
    """
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    if inputs_embeds is None:
        assert input_ids is not None
        ids = input_ids.view(-1, input_ids.shape[-1])
        model.warn_if_padding_and_no_attention_mask(ids, None)
        embeddings, shape = model.wte(ids), input_ids.shape
    else:
        embeddings, shape = inputs_embeds, inputs_embeds.shape[:-1]
    # Adding positions in float32 also promotes embeddings of less precision.
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, model.wpe.weight.dtype))
    hidden = loop(embeddings, **_ONCE)[0]
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden.view(*shape, -1))


def gpt2_unsupported(
    model: Model,
    input_ids: Tensor | None = None,
    *others: Any,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Iterator[str]:
    """Why a call of ``GPT2Model`` needs its own forward."""
    if input_ids is not None and inputs_embeds is None:
        tokens = input_ids.shape
    elif inputs_embeds is not None and input_ids is None:
        tokens = inputs_embeds.shape[:-1]
    else:
        yield "input_ids and inputs_embeds exclude each other, and one is needed"
        return
    if any(other is not None for other in others):
        yield "arguments after input_ids are given by position; give them by name"
    for name, what in (
        ("use_cache", "a cache of keys and values"),
        ("output_attentions", "attention weights"),
        ("output_hidden_states", "hidden states of every block"),
    ):
        given = options.pop(name, None)
        if given or (given is None and getattr(model.config, name, False)):
            yield f"{name} asks for {what}; pass {name}=False, or set config.{name} = False"
    given = options.pop("return_dict", None)
    if not (getattr(model.config, "return_dict", True) if given is None else given):
        yield "return_dict=False asks for a tuple"
    if attention_mask is not None:
        if torch.compiler.is_compiling():
            yield "an attention_mask can't be looked at inside torch.compile; leave out one of ones"
        elif attention_mask.shape != tokens or not attention_mask.all():
            yield "attention_mask hides tokens"
    yield from (f"{name} is given" for name, value in options.items() if value is not None)


def conv1d() -> type[nn.Module]:
    """transformers' ``Conv1D``, a Linear with a transposed weight; Linear without transformers."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)


def _attention(block: Model, x: Tensor) -> Tensor:
    S = x.shape[1]
    mask = x.new_full((S, S), -torch.inf).triu(1)  # which the eager implementation needs
    return block.attn(x, attention_mask=mask[None, None])[0]


_BLOCKS = Blocks("num_heads", conv1d, _attention)


def _backbone(model: Model) -> Model:
    return model._backbone


def _itself(model: Model) -> Model:
    return model


def _garg_examples(model: Model, generator: torch.Generator) -> list[Example]:
    xs_ys = random_prompt(model._read_in, model._backbone.wpe, generator)
    return [Example(*xs_ys), Example(*xs_ys, inds=[0])]


def _long_garg_call(model: Model, generator: torch.Generator, tokens: int) -> Example:
    points = {"B": 1, "most": tokens // 2}
    return Example(*random_prompt(model._read_in, model._backbone.wpe, generator, **points))


def _gpt2_examples(model: Model, generator: torch.Generator) -> list[Example]:
    S, V = min(5, model.wpe.weight.shape[0]), model.wte.weight.shape[0]
    ids = torch.randint(V, (2, S), generator=generator, device="cpu")
    return [_gpt2_example(input_ids=ids), _long_gpt2_call(model, generator, S)]


def _long_gpt2_call(model: Model, generator: torch.Generator, tokens: int) -> Example:
    n_positions, D = model.wpe.weight.shape
    shape = 1, min(tokens, n_positions), D
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return _gpt2_example(inputs_embeds=x)


def _gpt2_example(**inputs: Tensor) -> Example:
    plain = dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states"), False)
    return Example(**inputs, **plain, return_dict=True)


ARCHITECTURES = (
    Architecture(
        "the TransformerModel of Garg et al.",
        ("_backbone.h", "_read_in"),
        _backbone,
        garg_forward,
        ("_read_in.weight", "_read_out.weight"),
        _garg_examples,
        blocks=_BLOCKS,
        long_call=_long_garg_call,
    ),
    Architecture(
        "Hugging Face's GPT2Model",
        ("wte", "wpe", "h", "ln_f", "warn_if_padding_and_no_attention_mask"),
        _itself,
        gpt2_forward,
        ("wte.weight", "config"),
        _gpt2_examples,
        tokens_per_point=1,
        blocks=_BLOCKS,
        unsupported=gpt2_unsupported,
        long_call=_long_gpt2_call,
    ),
)
