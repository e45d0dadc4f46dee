"""The forward of the loop: two launches for every block, attention and the rows' kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from looped_fast.kernels.fold import fold
from looped_fast.kernels.history import History, empty_history, with_scratch
from looped_fast.kernels.launch import launch
from looped_fast.kernels.providers import PROVIDERS
from looped_fast.kernels.row_forward import row_forward_kernel
from looped_fast.kernels.tuning import Config, choose, operand_precision


class Injected(NamedTuple):
    """What a block's input is multiplied with and added to; None where with nothing. [B, S, D]."""

    scale: Tensor | None  # at a step's start
    shift: Tensor | None  # at a step's start
    inner_shift: Tensor | None  # between the blocks of a step


def injected(embeddings: Tensor, positions: Tensor, injection: str) -> Injected:
    """``Injected`` of a loop. embeddings: [B, S, D], positions: [S, D]."""
    if injection == "add":
        return Injected(None, embeddings + positions, None)
    if injection == "every_block":
        return Injected(None, embeddings + positions, embeddings)
    shift = positions.expand_as(embeddings).contiguous()
    return Injected(embeddings if injection == "mul" else None, shift, None)


def loop_forward(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    n_heads: int,
    n_loops: int,
    window: int,
    injection: str,
    operand: torch.dtype,
    attention: str,
    save_activations: bool,
    save_start: bool,
) -> tuple[Tensor, History]:
    """States of the last ``window`` steps, [W, B, S, D], and what was kept of the way there.

    Args:
        embeddings, positions, state, weights, n_heads, n_loops, window, injection: as of
            ``ops.loop``; fp32 and contiguous.
        operand: dtype of the matrix products' operands.
        attention: name of the attention provider.
        save_activations, save_start: what to keep, see ``History``.
    """
    n_layer = len(weights) // 12
    states = embeddings.new_empty((window, *embeddings.shape))
    history = empty_history(
        embeddings, n_layer, n_heads, window, operand, save_activations, save_start
    )
    fold(weights, history.folded_weights, history.folded_biases)
    run_steps(
        state,
        history if save_activations else with_scratch(history, embeddings, n_heads),
        injected(embeddings, positions, injection),
        weights[-2:],
        n_heads,
        n_loops,
        attention,
        states,
    )
    return states, history


def run_steps(
    state: Tensor,
    history: History,
    inputs: Injected,
    norm: Sequence[Tensor],
    n_heads: int,
    n_loops: int,
    attention: str,
    states: Tensor,
) -> None:
    """Fill ``states``, and ``history``, whose weights are folded already.

    Args:
        state: before the first step, [B, S, D].
        history: with slots for all steps of the window, or scratch.
        inputs: what every step gets.
        norm: scale and shift of the final LayerNorm, [D] each.
        n_heads: H.
        n_loops: how many steps to run.
        attention: name of the attention provider.
        states: after the last steps, [W, B, S, D].
    """
    B, S, D = state.shape
    n_layer, window = len(history.folded_weights), len(states)
    before = n_loops - window  # steps before the window
    n_slots = len(history.qkv)
    keep = n_slots == n_layer * window
    tf32 = operand_precision(history.qkv.dtype) == "tf32"
    x = torch.empty_like(state)

    def slot(step: int, block: int) -> int:
        """Steps before the window leave their activations where its first step does."""
        return (block * window + max(step - before, 0)) % n_slots

    def rows(config: Config, ends: tuple[int, int] | None, begins: tuple[int, int] | None) -> None:
        """From the attention of one (step, block) to that of the next."""
        head: list[Tensor | None] = [None] * 5
        step_end: list[Tensor | None] = [None] * 4
        tail: list[Tensor | None] = [None] * 7
        z = None
        if ends:
            step, block = ends
            i = slot(step, block)
            head = [
                history.attention[i], history.folded_weights[block], history.folded_biases[block],
                history.xhat2[i], history.rstd2[i],
            ]  # fmt: skip
            if block == n_layer - 1:
                w = step - before
                step_end = [*norm, None, None]
                if w >= 0:
                    z = states[w]
                    if keep:
                        step_end = [*norm, history.xhatf[w], history.rstdf[w]]
                elif w == -1 and len(history.start):
                    z = history.start
        else:
            z = state
        if begins:
            step, block = begins
            i = slot(step, block)
            tail = [
                inputs.scale if block == 0 else None,
                inputs.shift if block == 0 else inputs.inner_shift,
                history.folded_weights[block], history.folded_biases[block],
                history.xhat1[i], history.rstd1[i], history.qkv[i],
            ]  # fmt: skip
        launch(
            row_forward_kernel, (triton.cdiv(B * S, config.rows),), x, *head, *step_end, z, *tail,
            B * S, config=config, D=D, TF32=tf32,
        )  # fmt: skip

    config = choose(
        row_forward_kernel,
        width=D,
        precision=operand_precision(history.qkv.dtype),
        n_rows=B * S,
        device=state.device,
        run=lambda config: rows(config, (before, n_layer - 1), (before, 0)),
    )
    attend = PROVIDERS[attention].forward
    order = [(step, block) for step in range(n_loops) for block in range(n_layer)]
    rows(config, None, order[0])
    for here, following in zip(order, [*order[1:], None], strict=True):
        i = slot(*here)
        qkv, out = history.qkv[i].view(B, S, 3 * D), history.attention[i].view(B, S, D)
        attend(qkv, out, history.lse[i], n_heads)
        rows(config, here, following)
