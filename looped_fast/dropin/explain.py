"""Which backend runs a model, and why not another: ``looped_fast.explain_backend``."""

from __future__ import annotations

from torch import nn

from looped_fast.dropin.replacement import FastForward, replaced
from looped_fast.model import LoopedTransformer, ambient_precision
from looped_fast.ops import backends


def explain_backend(
    model: nn.Module,
    batch_size: int,
    n_points: int,
    precision: str | None = None,
    *,
    replayed_training: bool = False,
) -> backends.Explanation:
    """Say which backend runs ``model`` on such a batch, and for each other one, why not.

    >>> from looped_fast import ModelConfig
    >>> print(explain_backend(LoopedTransformer(ModelConfig()), batch_size=64, n_points=41))
    backend: ...

    Args:
        model: a ``LoopedTransformer``, or any model after ``accelerate``.
        batch_size: prompts.
        n_points: in-context points of a prompt, of two tokens each; tokens for nanoGPT's ``GPT``.
        precision: ``fp32``, ``bf16`` or ``fp16``; None: what ``accelerate`` was given, or else
            that of ``torch.autocast`` around this call.
        replayed_training: describe a training step that ``Trainer`` replays as a CUDA graph; by
            default, a call without gradients.

    Raises:
        ValueError: a model of other code that is not accelerated; or its backend is forced, and
            can't run it.
    """
    problem, backend = describe_call(model, batch_size, n_points, precision, replayed_training)
    return backends.explain(problem, backend)


def describe_call(
    model: nn.Module,
    batch_size: int,
    n_points: int,
    precision: str | None = None,
    replayed_training: bool = False,
) -> tuple[backends.Problem, str]:
    """What ``backends.explain`` takes; arguments and errors are those of ``explain_backend``."""
    replacement = replaced(model)
    if isinstance(model, LoopedTransformer):
        config, weight = model.config, model._read_in.weight
        settings = ("n_embd", "n_layer", "n_loops", "window", "injection")
        described = {name: getattr(config, name) for name in settings}
        backend, attention, graphed = model.backend, model.attention, model._loop
        seq_len, n_heads = 2 * n_points, config.n_head
    elif isinstance(replacement, FastForward):
        stack = replacement.stack
        weight, backend, attention = stack.wpe.weight, replacement.backend, replacement.attention
        graphed = replacement.graphed
        seq_len = replacement.architecture.tokens_per_point * n_points
        n_heads = stack.h[0].attn.n_head
        # How often it loops is an argument of its calls, and decides nothing here.
        described = {"n_embd": weight.shape[1], "n_layer": len(stack.h), "n_loops": 1, "window": 1,
                     "injection": "none"}  # fmt: skip
    else:
        raise ValueError(
            f"a {type(model).__name__} runs its own code; looped_fast.accelerate(model) first"
        )
    device = weight.device.type
    replays_inference = device == "cuda" and graphed.mode != "off"
    given = precision or (replacement and replacement.precision)
    problem = backends.Problem(
        device=device,
        dtype=weight.dtype,
        precision=given or ambient_precision(device),
        batch=batch_size,
        seq_len=seq_len,
        n_heads=n_heads,
        attention=attention,
        device_index=weight.device.index or 0,
        replayed=replayed_training or replays_inference,
        training=replayed_training,
        **described,
    )
    return problem, backend
