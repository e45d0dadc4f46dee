"""Models of other code bases that ``accelerate`` knows: their structure, and their forward.

The forwards here have the signatures and results of the originals, but run the whole loop as one
op. They read parameters from the original modules at every call, so nothing is copied.

Sources: official ``scripts/models.py`` (Leiay/looped_transformer) for the in-context models,
nanoGPT's ``model.py`` for the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped_fast.ops.reference import interleave, is_autocast_enabled

Model = Any  # an nn.Module of another code base, known by its attributes only


# ops.loop on one model's blocks: (embeddings [B, S, D], *, n_loops, window, injection, read_out)
# -> states [W, B, S, D], or predictions with a read_out
Loop = Callable[..., Tensor]


@dataclass(frozen=True)
class Architecture:
    """One known structure. Functions are module-level, so that accelerated models pickle."""

    name: str
    markers: tuple[str, ...]  # attributes that tell it from those below it in ARCHITECTURES
    stack: Callable[[Model], Model]  # the module that holds wpe, h and ln_f
    forward: Callable[..., Any]  # (model, loop, *original arguments) -> the original's result
    needs: tuple[str, ...]  # further attributes that ``forward`` reads
    example_calls: Callable[[Model, torch.Generator], list[tuple[Any, ...]]]
    tokens_per_point: int = 2  # x and y


def has(module: Model, path: str) -> bool:
    """True if ``module`` has the dotted attribute ``path``."""
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def weight_and_bias(module: Model) -> list[Tensor]:
    """Parameters of a Linear or LayerNorm; zeros for no bias (nanoGPT's ``bias=False``)."""
    if getattr(module, "bias", None) is None:
        return [module.weight, module.weight.new_zeros(module.weight.shape[0])]
    return [module.weight, module.bias]


def block_weights(block: Model) -> list[Tensor]:
    """The block's parameters in the order of ``reference.Block``."""
    attn, mlp = block.attn, block.mlp
    modules = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
    return [tensor for module in modules for tensor in weight_and_bias(module)]


def stack_weights(stack: Model) -> list[Tensor]:
    """The ``weights`` argument of ``ops.loop``."""
    weights = [tensor for block in stack.h for tensor in block_weights(block)]
    return weights + weight_and_bias(stack.ln_f)


def looped_forward(
    model: Model, loop: Loop, xs: Tensor, ys: Tensor, n_loop_start: int, n_loops: int
) -> list[Tensor]:
    """``TransformerModelLooped.forward``: predictions [B, n] after each step with gradient.

    xs: [B, n, d], ys: [B, n]. The first ``n_loop_start`` of ``n_loops`` steps have no gradient.
    """
    window = n_loops - max(n_loop_start, 0)
    if window < 1:
        return []
    embeddings = _read_in(model, xs, ys)
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
    embeddings = _read_in(model, xs, ys)
    injection = "every_block" if add_inputs_embeds else "none"
    settings = {"n_loops": 1, "window": 1, "injection": injection}
    return _predict(model, loop, embeddings, settings)[0]


def tied_forward(
    model: Model, loop: Loop, xs: Tensor, ys: Tensor, add_inputs_embeds: bool
) -> Tensor:
    """``TransformerModelTying.forward``: one block ``n_layer`` times; it ignores its last argument.

    xs: [B, n, d], ys: [B, n] -> [B, n].
    """
    embeddings = _read_in(model, xs, ys)
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


def _read_in(model: Model, xs: Tensor, ys: Tensor) -> Tensor:
    """The embedded prompt in the parameters' dtype, [B, 2n, D]; autocast may have lowered it."""
    return model._read_in(interleave(xs, ys)).to(model._read_in.weight.dtype)


def _predict(model: Model, loop: Loop, embeddings: Tensor, settings: dict[str, Any]) -> Tensor:
    """Predictions at the x positions, [W, B, n(, 2)], read out by the loop if it can."""
    read_out, x_tokens = model._read_out, slice(model.ind, None, model.freq)
    if type(read_out) is nn.Linear and x_tokens == slice(0, None, 2):  # what the op reads out
        outputs = loop(embeddings, read_out=weight_and_bias(read_out), **settings)
        predictions = outputs.to(_output_dtype(outputs))
    else:
        predictions = read_out(loop(embeddings, **settings)[:, :, x_tokens])
    return predictions[..., 0] if model._pred_type == "regression" else predictions


def _output_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a Linear returns for ``tensor``, under autocast or not."""
    device = tensor.device.type
    is_lowered = is_autocast_enabled(device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_lowered else tensor.dtype


def _backbone_stack(model: Model) -> Model:
    return model._backbone.transformer


def _own_stack(model: Model) -> Model:
    return model.transformer


def _prompt(model: Model, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random float64 xs [2, n, d] and ys [2, n], n at most 3, on the CPU."""
    n = min(3, model._backbone.transformer.wpe.weight.shape[0] // 2)
    d = model._read_in.weight.shape[1]
    xs = torch.randn(2, n, d, generator=generator, dtype=torch.float64, device="cpu")
    ys = torch.randn(2, n, generator=generator, dtype=torch.float64, device="cpu")
    return xs, ys


def _looped_examples(model: Model, generator: torch.Generator) -> list[tuple[Any, ...]]:
    return [(*_prompt(model, generator), 1, 3)]


def _standard_examples(model: Model, generator: torch.Generator) -> list[tuple[Any, ...]]:
    prompt = _prompt(model, generator)
    return [(*prompt, False), (*prompt, True)]


def _tied_examples(model: Model, generator: torch.Generator) -> list[tuple[Any, ...]]:
    return [(*_prompt(model, generator), False)]


def _gpt_examples(model: Model, generator: torch.Generator) -> list[tuple[Any, ...]]:
    S, V = min(5, model.transformer.wpe.weight.shape[0]), model.transformer.wte.weight.shape[0]
    idx, targets = torch.randint(V, (2, 2, S), generator=generator, device="cpu")
    return [(idx,), (idx, targets)]


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
)


def recognise(model: Model) -> Architecture | None:
    """The architecture that ``model`` looks like, or None; ``verify`` compares results."""
    for architecture in ARCHITECTURES:
        if all(has(model, marker) for marker in architecture.markers):
            return architecture
    return None
