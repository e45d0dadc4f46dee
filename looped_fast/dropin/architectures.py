"""Models of other code bases that ``accelerate`` knows: their structure, and their forward.

The forwards here have the signatures and results of the originals, but run the whole loop as one
op. They read parameters from the original modules at every call, so nothing is copied.
``hugging_face`` has those of models that are made of Hugging Face's ``GPT2Model``.

Sources: official ``scripts/models.py`` (Leiay/looped_transformer) for the in-context models,
nanoGPT's ``model.py`` for the language model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looped_fast.dropin import hugging_face
from looped_fast.dropin.structure import (
    Architecture,
    Example,
    Loop,
    Model,
    embed,
    has,
    predict,
    prompt,
)


def looped_forward(
    model: Model, loop: Loop, xs: Tensor, ys: Tensor, n_loop_start: int, n_loops: int
) -> list[Tensor]:
    """``TransformerModelLooped.forward``: predictions [B, n] after each step with gradient.

    xs: [B, n, d], ys: [B, n]. The first ``n_loop_start`` of ``n_loops`` steps have no gradient.
    """
    window = n_loops - max(n_loop_start, 0)
    if window < 1:
        return []
    embeddings = embed(model, xs, ys)
    if model.loop_func == "z=f(x+z)":
        injection = "add"
    elif model.loop_func == "z=f(x*z)":
        injection = "mul"
    else:
        raise ValueError(f"loop_func = {model.loop_func!r}; use 'z=f(x+z)' or 'z=f(x*z)'")
    settings = {"n_loops": n_loops, "window": window, "injection": injection}
    return list(_predict(model, loop, embeddings, settings))


def standard_forward(
    model: Model, loop: Loop, xs: Tensor, ys: Tensor, add_inputs_embeds: bool = False
) -> Tensor:
    """``TransformerModel.forward``: all blocks once. xs: [B, n, d], ys: [B, n] -> [B, n]."""
    embeddings = embed(model, xs, ys)
    injection = "every_block" if add_inputs_embeds else "none"
    settings = {"n_loops": 1, "window": 1, "injection": injection}
    return _predict(model, loop, embeddings, settings)[0]


def tied_forward(
    model: Model, loop: Loop, xs: Tensor, ys: Tensor, add_inputs_embeds: bool
) -> Tensor:
    """``TransformerModelTying.forward``: one block ``n_layer`` times; it ignores its last argument.

    xs: [B, n, d], ys: [B, n] -> [B, n].
    """
    embeddings = embed(model, xs, ys)
    steps = model.n_layer  # all carry gradient
    settings = {"n_loops": steps, "window": steps, "injection": "none"}
    return _predict(model, loop, embeddings, settings)[-1]


def gpt_forward(
    model: Model, loop: Loop, idx: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """nanoGPT's ``GPT.forward``. idx, targets: [B, S] int64 -> logits, and the mean loss.

    Logits are [B, S, V] with targets, else [B, 1, V], of the last position.
    """
    embeddings = model.transformer.wte(idx)  # [B, S, D]
    x = loop(embeddings, n_loops=1, window=1, injection="none")[0]
    if targets is None:
        return model.lm_head(x[:, [-1], :]), None
    logits = model.lm_head(x)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
    return logits, loss


def _predict(model: Model, loop: Loop, embeddings: Tensor, settings: dict[str, Any]) -> Tensor:
    """Predictions at the x positions, [W, B, n(, 2)]."""
    x_tokens = slice(model.ind, None, model.freq)
    predictions = predict(model._read_out, loop, embeddings, settings, x_tokens)
    return predictions[..., 0] if model._pred_type == "regression" else predictions


def _backbone_stack(model: Model) -> Model:
    return model._backbone.transformer


def _own_stack(model: Model) -> Model:
    return model.transformer


def _looped_examples(model: Model, generator: torch.Generator) -> list[Example]:
    return [Example(*_prompt(model, generator), 1, 3)]


def _standard_examples(model: Model, generator: torch.Generator) -> list[Example]:
    xs_ys = _prompt(model, generator)
    return [Example(*xs_ys, False), Example(*xs_ys, True)]


def _tied_examples(model: Model, generator: torch.Generator) -> list[Example]:
    return [Example(*_prompt(model, generator), False)]


def _prompt(model: Model, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return prompt(model._read_in, model._backbone.transformer.wpe, generator)


def _gpt_examples(model: Model, generator: torch.Generator) -> list[Example]:
    S, V = min(5, model.transformer.wpe.weight.shape[0]), model.transformer.wte.weight.shape[0]
    idx, targets = torch.randint(V, (2, 2, S), generator=generator, device="cpu")
    return [Example(idx), Example(idx, targets)]


_IN_CONTEXT = ("_read_in.weight", "_read_out.weight", "_pred_type", "freq", "ind")

ARCHITECTURES = (
    Architecture(
        "TransformerModelLooped",
        ("_backbone.transformer", "loop_func"),
        _backbone_stack,
        looped_forward,
        _IN_CONTEXT,
        _looped_examples,
    ),
    Architecture(
        "TransformerModelTying",
        ("_backbone.transformer", "f"),
        _backbone_stack,
        tied_forward,
        (*_IN_CONTEXT, "n_layer"),
        _tied_examples,
    ),
    Architecture(
        "TransformerModel",
        ("_backbone.transformer", "_read_in"),
        _backbone_stack,
        standard_forward,
        _IN_CONTEXT,
        _standard_examples,
    ),
    Architecture(
        "nanoGPT's GPT",
        ("transformer.wte", "lm_head"),
        _own_stack,
        gpt_forward,
        ("transformer.wte.weight",),
        _gpt_examples,
        tokens_per_point=1,
    ),
    *hugging_face.ARCHITECTURES,
)


def recognise(model: Model) -> Architecture | None:
    """The architecture that ``model`` looks like, or None; ``verify`` compares results."""
    for architecture in ARCHITECTURES:
        if all(has(model, marker) for marker in architecture.markers):
            return architecture
    return None
