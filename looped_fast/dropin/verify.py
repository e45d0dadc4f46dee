"""Verify that a model that looks like a known architecture also computes the same function.

Attributes do not tell: an activation, a mask or a scale can sit anywhere in a forward. So tiny
random inputs go through the original and through its replacement, with random parameters in
place of the model's own (which may be zero, and hide a difference), in float64 on the CPU (where
neither TF32 nor a missing GPU matters), and outputs and gradients are compared. The model, the
random number generators and standard output are left as they were; hooks on modules that stay in
use (read-in, read-out) do run. Attention, which may have a sliding window, is compared at the
model's full length too. On one core a looped model of the paper's size takes 1 s, a standard one
2 s, GPT-2 40 s. The memory needed is that of parameters and gradients in float64.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from looped_fast.config import LAYER_NORM_EPS
from looped_fast.dropin.structure import (
    Architecture,
    Example,
    Loop,
    Model,
    block_weights,
    weight_and_bias,
)
from looped_fast.ops import reference

Function = Callable[..., Any]  # (module, *inputs) -> a Tensor, or a sequence of Tensor or None

TOLERANCE = 1e-6  # relative, of float64 results; a lookalike that rounds to float32 passes
MAX_TOKENS = 1024  # longest input on which attention is compared


class _Call(nn.Module):
    """Calls ``function(module, ...)``, so that ``functional_call`` can swap the parameters.

    Neither the module's own hooks run nor a forward that was replaced on the instance.
    """

    def __init__(self, module: nn.Module, function: Function) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


def differences(
    model: Model, architecture: Architecture, loop: Loop, *, outputs_only: bool = False
) -> list[str]:
    """Differences found between ``model`` and ``architecture``; empty if there are none.

    Args:
        model: has all the attributes of ``architecture``.
        architecture: the one that ``model`` resembles.
        loop: the loop op on the model's own blocks, on the reference backend.
        outputs_only: compare short inputs, without gradients, of a model verified before.
    """
    generator = torch.Generator().manual_seed(0)
    stack = architecture.stack(model)

    def replacement(model: Model, *args: Any, **kwargs: Any) -> Any:
        return architecture.forward(model, loop, *args, **kwargs)

    def mismatched(call: Example) -> str | None:
        return mismatch(model, type(model).forward, replacement, call, generator)

    with no_trace(model), torch.set_grad_enabled(not outputs_only):
        found = list(_different_norms(stack, generator))
        for call in architecture.example_calls(model, generator):
            if (why := mismatched(call)) is not None:
                found += _different_layers(model, architecture, generator)
                return found or [f"its forward is not {architecture.name}'s: {why}"]
        if found or outputs_only:
            return found
        if architecture.long_call is None:
            return list(_different_far_back(model, architecture, generator))
        with torch.no_grad():
            why = mismatched(architecture.long_call(model, generator, MAX_TOKENS))
    return [] if why is None else [f"its forward differs where inputs are long: {why}"]


@contextlib.contextmanager
def no_trace(model: Model) -> Iterator[None]:
    """Undo the side effects of the original forward (the official one prints, once)."""
    attributes = dict(model.__dict__)
    with (
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stdout(io.StringIO()),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        try:
            yield
        finally:
            model.__dict__.clear()
            model.__dict__.update(attributes)


def _different_norms(stack: Model, generator: torch.Generator) -> Iterator[str]:
    """Compare LayerNorms on inputs with a variance of about eps: a larger one hides eps."""
    D = stack.wpe.weight.shape[1]
    x = LAYER_NORM_EPS**0.5 * randn((2, 5, D), generator)

    def replacement(norm: Model, x: Tensor) -> Tensor:
        weight, bias = weight_and_bias(norm)
        return nn.functional.layer_norm(x, (D,), weight, bias, LAYER_NORM_EPS)

    norms: dict[str, Model] = {}
    for i, block in enumerate(stack.h):
        norms |= {f"h.{i}.ln_1": block.ln_1, f"h.{i}.ln_2": block.ln_2}
    for name, norm in [*norms.items(), ("ln_f", stack.ln_f)]:
        why = mismatch(norm, lambda norm, x: norm(x), replacement, Example(x), generator)
        if why is not None:
            yield f"{name} is not LayerNorm over {D} elements with eps {LAYER_NORM_EPS}: {why}"


def _different_far_back(
    model: Model, architecture: Architecture, generator: torch.Generator
) -> Iterator[str]:
    """Compare attention, without gradients, on long inputs: only these show a sliding window."""
    stack, attention = architecture.stack(model), _our_attention(architecture.n_heads(model))
    n_positions, D = stack.wpe.weight.shape
    x = randn((1, min(n_positions, MAX_TOKENS), D), generator)
    with torch.no_grad():
        for i, block in enumerate(stack.h):
            why = mismatch(block, architecture.blocks.attention, attention, Example(x), generator)
            if why is not None:
                yield f"h.{i}.attn does not see all earlier of {x.shape[1]} tokens: {why}"


def _our_attention(n_heads: int) -> Function:
    def attention(block: Model, x: Tensor) -> Tensor:
        return reference.attention(x, reference.BlockWeights.of(block_weights(block)), n_heads)

    return attention


def _different_layers(
    model: Model, architecture: Architecture, generator: torch.Generator
) -> Iterator[str]:
    stack, n_heads = architecture.stack(model), architecture.n_heads(model)
    x = 2 * randn((2, 5, stack.wpe.weight.shape[1]), generator)  # GELU's forms differ most at 2
    their_attention, our_attention = architecture.blocks.attention, _our_attention(n_heads)

    def mlp(block: Model, x: Tensor) -> Tensor:
        return reference.mlp(x, reference.BlockWeights.of(block_weights(block)))

    for i, block in enumerate(stack.h):
        why = mismatch(block, their_attention, our_attention, Example(x), generator)
        if why is not None:
            yield f"h.{i}.attn is not causal attention with {n_heads} heads, or drops out: {why}"
        why = mismatch(block, lambda block, x: block.mlp(x), mlp, Example(x), generator)
        if why is not None:
            yield f"h.{i}.mlp is not Linear, GELU in its tanh form (not exact), Linear: {why}"


def mismatch(
    module: nn.Module,
    original: Function,
    replacement: Function,
    call: Example,
    generator: torch.Generator,
) -> str | None:
    """How the two functions differ, in outputs and gradients; None if they agree.

    Gradients are those of the parameters, and of tensors of the call that need one.
    """
    parameters = _random_parameters(module, generator)
    given = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    leaves = [*parameters.values(), *(t for t in given if t.requires_grad)]
    buffers = {f"module.{name}": buffer.cpu() for name, buffer in module.named_buffers()}
    cotangents: list[Tensor] = []
    results = []
    for function in (original, replacement):
        try:
            returned = torch.func.functional_call(
                _Call(module, function), {**parameters, **buffers}, call.args, call.kwargs
            )
            outputs = _tensors(returned)
            if not cotangents:
                cotangents = [randn(o.shape, generator) for o in outputs]
            gradients: Sequence[Tensor] = ()
            if torch.is_grad_enabled():
                recorded = [i for i, output in enumerate(outputs) if output.requires_grad]
                gradients = torch.autograd.grad(
                    [outputs[i] for i in recorded],
                    leaves,
                    [cotangents[i].to(outputs[i].dtype) for i in recorded],
                    materialize_grads=True,
                )
        except Exception as error:  # the original is unknown code, and may raise anything
            return f"it raises {type(error).__name__}: {error}"
        results.append((outputs, gradients))
    (expected, expected_gradients), (actual, actual_gradients) = results
    if [o.shape for o in expected] != [o.shape for o in actual]:
        return f"outputs have shapes {[tuple(o.shape) for o in expected]}"
    for kind, theirs, ours in (
        ("outputs", expected, actual),
        ("gradients", expected_gradients, actual_gradients),
    ):
        errors = [_relative_error(a, b) for a, b in zip(theirs, ours, strict=True)]
        distance = max(errors, default=0.0)
        if not distance <= TOLERANCE:
            return f"{kind} differ by {distance:.1e} of their size"
    return None


def _random_parameters(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters by their name in ``_Call``; weight matrices keep the scale of their inputs."""
    return {
        f"module.{name}": (
            randn(p.shape, generator) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1)
        ).requires_grad_()
        for name, p in module.named_parameters()
    }


def randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal values in float64 on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _tensors(returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor | None):
        return [] if returned is None else [returned]
    if isinstance(returned, dict):  # transformers' outputs
        returned = list(returned.values())
    elif not isinstance(returned, list | tuple):
        returned = list(vars(returned).values())  # a dataclass
    return [tensor for part in returned for tensor in _tensors(part)]


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    scale = expected.norm().clamp_min(1e-6)  # all are of order 1, or zero (unused positions)
    return ((actual - expected).norm() / scale).item()
