"""Floating-point operations of the loop: one count for benchmarks, trainer and FlopCounterMode.

Counted are matrix products, 2 operations for a multiplication and an addition, by the convention
of ``torch.utils.flop_counter``: attention multiplies all S keys of a query, also those that the
causal mask hides, and its backward computes the scores again, 5 products to the forward's 2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from looped_fast.ops.block import GPT2, KINDS, Block, block_names, final_names, shape_of

Arguments = dict[str, Any]  # of an op by name, with shapes for tensors


def loop_flops(
    batch: int,
    seq_len: int,
    n_embd: int,
    n_layer: int,
    forward: int,
    backward: int = 0,
    keys: float | None = None,
    block: Block = GPT2,
) -> float:
    """Count the operations in the blocks of a loop whose parameters are all trained.

    Args:
        batch: B.
        seq_len: S.
        n_embd: D.
        n_layer: blocks in a loop step.
        forward: loop steps forward, and those that a backward recomputes.
        backward: loop steps backward.
        keys: keys that a query meets, on average; S by default, as PyTorch counts. Kernels that
            skip what the causal mask hides compute (S + 1) / 2.
        block: settings of the blocks.
    """
    keys = seq_len if keys is None else keys
    n_weights = sum(_numel(name, block, n_embd) for name in block_names(block))
    matrices, attention = 2 * n_weights, 2 * n_embd * keys  # of a token
    steps = forward * (matrices + 2 * attention) + backward * (2 * matrices + 5 * attention)
    return batch * seq_len * n_layer * steps


def _numel(name: str, block: Block, n_embd: int) -> int:
    """Elements of a block's weight if it is a matrix, else 0."""
    shape = shape_of(name, n_embd, block.hidden(n_embd), block.fc_width(n_embd))
    return math.prod(shape) if len(shape) == 2 else 0


def register() -> None:
    """Register the ops of this package with FlopCounterMode, if that is imported.

    Counters that are counting already get the formulas, too. This package does not import
    ``torch.utils.flop_counter`` itself, which takes 0.2 s where Triton is installed. PyTorch has no
    formula for its own attention on CPUs, and gets that of its attention on GPUs.
    """
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    registry = counter.flop_registry
    for name, formula in _FORMULAS.items():
        packet = getattr(torch.ops.looped_fast, name, None)  # the engine's ops come with it
        if isinstance(packet, torch._ops.OpOverloadPacket) and packet not in registry:
            counter.register_flop_formula(packet)(_by_name(packet, formula))
    for packet, like in _ATTENTION_ON_CPU.items():
        if packet not in registry:
            counter.register_flop_formula(packet, get_raw=True)(registry[like])
    for mode in _get_current_dispatch_mode_stack():
        active = getattr(mode, "counter", mode)
        if isinstance(active, counter.FlopCounterMode):
            active.flop_registry = {**registry, **active.flop_registry}


_aten = torch.ops.aten
_ATTENTION_ON_CPU = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}


def _by_name(packet: Any, formula: Callable[[Arguments], int]) -> Callable[..., int]:
    """A formula for FlopCounterMode, which passes arguments in the order of the schema."""
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **kwargs})

    return count


def _forward(call: Arguments) -> int:
    """The loop and the read-out, of all tokens, as the reference computes it."""
    B, S, D = call["embeddings"]
    block, n_weights = _block(call), len(call["weights"])
    own = call["weights"][-2:] if block.has_read_out(n_weights) else []
    read_out = call.get("read_out") or own
    n_outputs = read_out[0][0] if read_out else 0
    (n_queries,) = call.get("seen") or (0,)
    n_layer, keys = block.n_layer(n_weights), S - n_queries
    loop = loop_flops(B, S, D, n_layer, call["n_loops"], keys=keys, block=block)
    return int(loop) + 2 * call["window"] * B * S * D * n_outputs


def _backward(call: Arguments) -> int:
    """Gradients that are wanted, and those of inputs that they flow through."""
    B, S, D = call["embeddings"]
    block, n_weights = _block(call), len(call["weights"])
    n_outputs = call["weights"][-1][0] if block.has_read_out(n_weights) else 0
    window, injection = call["window"], call["injection"]
    of_embeddings, of_positions, of_state, *of_weights = call["wanted"]
    of_loop, of_read_out = of_weights[: -2 if n_outputs else None], of_weights[-2:]
    of_state = of_state and window == call["n_loops"]
    flows = (of_embeddings and injection != "none") or of_positions or of_state
    first, flows = _step_backward(flows, of_loop, block, S, D)
    others, _ = _step_backward(flows, of_loop, block, S, D)
    read_out = 2 * D * n_outputs * (flows + of_read_out[0])
    return B * S * (first + (window - 1) * others + window * read_out)


def _step_backward(
    flows: bool, wanted: Sequence[bool], block: Block, S: int, D: int
) -> tuple[int, bool]:
    """A token's operations in a step backward.

    Args:
        flows: whether a gradient flows into the step's input.
        wanted: whether that of each weight of the blocks and of the final norm is.
        block: settings of the blocks.
        S: tokens.
        D: width.

    Returns:
        The operations, and whether a gradient flows into the step's result.
    """
    flops = 0
    names = (*block_names(block) * block.n_layer(len(wanted)), *final_names(block))
    for name, is_wanted in zip(names, wanted, strict=True):
        if name == "attn_c_proj_weight":  # attention comes first
            flops += 10 * D * S * flows
        flops += 2 * _numel(name, block, D) * (flows + is_wanted)
        flows = flows or is_wanted
    return flops, flows


def _block(call: Arguments) -> Block:
    """Settings of the blocks of a call of any of the ops; the engine's name a kind of block."""
    if "block" in call:
        return KINDS[call["block"]]._replace(mlp_hidden=call["n_hidden"])
    return Block(**{name: call.get(f"block_{name}", getattr(GPT2, name)) for name in Block._fields})


def _recomputing_backward(call: Arguments) -> int:
    """The backward of activations, or of states that they are recomputed from."""
    recomputes = call["recompute"] if "recompute" in call else call["operands"][0] == 0
    B, S, D = call["embeddings"]
    block = _block(call)
    n_layer = block.n_layer(len(call["weights"]))
    again = loop_flops(B, S, D, n_layer, call["window"], block=block) if recomputes else 0
    return int(again) + _backward(call)


def _read_in(call: Arguments) -> int:
    (B, n, d), D = call["xs"], call["bias"][0]
    return 2 * B * 2 * n * d * D


_FORMULAS: dict[str, Callable[[Arguments], int]] = {
    "loop": _forward,
    "loop_mse": _forward,
    "read_in": _read_in,
    "cpu_read_in": _read_in,
    "cpu_loop_infer": _forward,
    "cpu_loop_forward": _forward,
    "cpu_loop_backward": _recomputing_backward,
    "cpu_loop_mse": lambda call: _forward(call) + _backward(call),
    "triton_loop_forward": _forward,
    "triton_loop_backward": _recomputing_backward,
}
