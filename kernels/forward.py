"""The forward of the loop: two launches for every block, attention and the row kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from looped_fast.ops.call import LoopSettings
from looped_fast.ops.reference import AUTOCAST_DTYPES

from . import few_rows
from .candidates import Config, operand_precision
from .few_rows import Arguments, FewRows
from .fold import fold
from .launch import launch
from .providers import PROVIDERS
from .row_forward import row_forward_kernel
from .saved_activations import SavedActivations, empty_saved, with_scratch
from .tuning import choose


class Injected(NamedTuple):
    """Factor and summands of the blocks' inputs, [B, S, D] each; None: there is none."""

    scale: Tensor | None  # at a step's start
    shift: Tensor  # at a step's start
    inner_shift: Tensor | None  # between the blocks of a step


class ReadOut(NamedTuple):
    """Predictions of the last steps, and the Linear that makes them."""

    weight: Tensor  # [n_outputs, D]
    bias: Tensor  # [n_outputs]
    targets: Tensor | None  # [B, ceil(S / 2), n_outputs]: those of the even tokens
    predictions: Tensor  # out [R, B, S, n_outputs]; errors, which are 0 at odd tokens, with targets


def injected(embeddings: Tensor, positions: Tensor, injection: str) -> Injected:
    """Make ``Injected`` of ``embeddings`` [B, S, D] and ``positions`` [S, D]."""
    if injection == "add":
        return Injected(None, embeddings + positions, None)
    if injection == "every_block":
        return Injected(None, embeddings + positions, embeddings)
    shift = positions.expand_as(embeddings).contiguous()
    return Injected(embeddings if injection == "mul" else None, shift, None)


def loop_forward(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    read_out: Sequence[Tensor],
    settings: LoopSettings,
    save_activations: bool,
    save_start: bool,
    save_states: bool,
    targets: Tensor | None = None,
    n_supervised: int | None = None,
) -> tuple[Tensor, SavedActivations]:
    """Run the loop: states of the last ``window`` steps, or predictions or errors of them.

    Args:
        embeddings, positions, state, weights, read_out: as in ``ops.loop``; fp32 and contiguous.
        settings: the call's; ``attention`` names a provider.
        save_activations, save_start, save_states: what to save, see ``SavedActivations``.
        targets: [B, (S + 1) // 2, n_outputs], subtracted from the even tokens' predictions.
        n_supervised: last steps whose predictions are wanted; ``window`` by default.

    Returns:
        States [W, B, S, D]; with a read-out predictions [n_supervised, B, S, n_outputs], or with
        targets their errors, 0 at odd tokens; fp32. And the saved activations.
    """
    n_layer = len(weights) // 12
    operand, window = AUTOCAST_DTYPES[settings.precision] or torch.float32, settings.window
    saved = empty_saved(
        embeddings, n_layer, settings.n_heads, window, operand, save_activations, save_start,
        save_states,
    )  # fmt: skip
    fold(weights, saved.folded_weights, saved.folded_biases)
    n_steps, (B, S, D) = n_supervised or window, embeddings.shape
    reading = None
    if read_out:
        weight, bias = read_out
        result, states = embeddings.new_empty((n_steps, B, S, len(bias))), saved.states
        reading = ReadOut(weight, bias, targets, result)
    else:
        result = states = embeddings.new_empty((window, B, S, D))
    run_steps(
        state,
        saved if save_activations else with_scratch(saved, embeddings, settings.n_heads),
        injected(embeddings, positions, settings.injection),
        weights[-2:],
        settings,
        save_activations,
        states if len(states) else None,
        reading,
    )
    return result, saved


class Rows:
    """Launches of the row kernel, with tiles that suit the number of rows."""

    def __init__(
        self,
        like: Tensor,  # [B, S, D] fp32
        operand: torch.dtype,
        common: tuple[Arguments, Arguments, Arguments],  # most frequent of ``launch``
    ) -> None:
        self.x, self.S, self.D = torch.empty_like(like), *like.shape[-2:]
        precision = operand_precision(operand)
        self.tf32 = precision == "tf32"
        self.config = choose(
            row_forward_kernel,
            width=self.D,
            precision=precision,
            n_rows=like[..., 0].numel(),
            device=like.device,
            run=lambda config: self._launch(config, *common),
        )

    def launch(self, head: Arguments, step_end: Arguments, tail: Arguments) -> None:
        """Launch from one attention to the next."""
        self._launch(self.config, head, step_end, tail)

    def _launch(
        self, config: Config, head: Arguments, step_end: Arguments, tail: Arguments
    ) -> None:
        n_rows, read_out_bias = self.x[..., 0].numel(), step_end[6]
        launch(
            row_forward_kernel, (triton.cdiv(n_rows, config.rows),), self.x, *head, *step_end,
            *tail, n_rows, self.S, config=config, D=self.D, TF32=self.tf32,
            OUTPUTS=0 if read_out_bias is None else len(read_out_bias),
        )  # fmt: skip


def run_steps(
    state: Tensor | None,
    saved: SavedActivations,
    inputs: Injected,
    norm: Sequence[Tensor],
    settings: LoopSettings,
    save_activations: bool,
    states: Tensor | None,
    read_out: ReadOut | None = None,
) -> None:
    """Fill ``states``, predictions and ``saved``, whose weights are folded already.

    Args:
        state: before the first step, [B, S, D]; None for the injection's neutral element.
        saved: with slots for all steps of the window if ``save_activations``, or scratch.
        inputs: what every step takes in.
        norm: scale and shift of the final LayerNorm, [D] each.
        settings: the call's; ``n_loops`` steps run, and the last ``window`` give results.
        save_activations: True if a backward needs them.
        states: after the last steps, [W, B, S, D]; None: not wanted.
        read_out: makes predictions of these states; None: not wanted.
    """
    B, S, D = inputs.shift.shape
    n_loops, window = settings.n_loops, settings.window
    n_layer = len(saved.folded_weights)
    before = n_loops - window  # steps before the window
    n_slots = len(saved.qkv)

    def slot(step: int, block: int) -> int:
        """Slot of a step's block; steps before the window share those of its first step."""
        return (block * window + max(step - before, 0)) % n_slots

    def step_end(step: int) -> list[Tensor | None]:
        """Arguments of the kernel from ``norm_weight`` to ``targets``."""
        w = step - before
        normed: list[Tensor | None] = [None, None]
        z = None
        if w >= 0:
            normed = [saved.xhatf[w], saved.rstdf[w]] if save_activations else normed
            z = None if states is None else states[w]
        elif w == -1 and len(saved.start):
            z = saved.start
        if read_out is None or (i := w - window + len(read_out.predictions)) < 0:
            return [*norm, *normed, z, None, None, None, None]
        weight, bias, targets, predictions = read_out
        return [*norm, *normed, z, weight, bias, predictions[i], targets]

    def arguments(
        ends: tuple[int, int] | None, begins: tuple[int, int] | None
    ) -> tuple[Arguments, Arguments, Arguments]:
        """HEAD, STEP_END and TAIL from the attention of one (step, block) to that of the next."""
        head: list[Tensor | None] = [None] * 5
        middle: list[Tensor | None] = [None] * 9
        tail: list[Tensor | None] = [None] * 7
        if ends:
            step, block = ends
            i = slot(step, block)
            head = [
                saved.attention[i], saved.folded_weights[block], saved.folded_biases[block],
                saved.xhat2[i], saved.rstd2[i],
            ]  # fmt: skip
            if block == n_layer - 1:
                middle = step_end(step)
        else:
            middle[4] = state
        if begins:
            step, block = begins
            i = slot(step, block)
            tail = [
                inputs.scale if block == 0 else None,
                inputs.shift if block == 0 else inputs.inner_shift,
                saved.folded_weights[block], saved.folded_biases[block],
                saved.xhat1[i], saved.rstd1[i], saved.qkv[i],
            ]  # fmt: skip
        return head, middle, tail

    rows: FewRows | Rows
    if not save_activations and B * S <= few_rows.MAX_ROWS:
        rows = FewRows(inputs.shift, saved.qkv.dtype)
    else:
        n_wanted = window if read_out is None else len(read_out.predictions)
        step = n_loops - 1 if 2 * n_wanted > n_loops else 0
        common = arguments((step, n_layer - 1), (step, 0))
        rows = Rows(inputs.shift, saved.qkv.dtype, common)
    attend = PROVIDERS[settings.attention].forward
    order = [(step, block) for step in range(n_loops) for block in range(n_layer)]
    rows.launch(*arguments(None, order[0]))
    for here, following in zip(order, [*order[1:], None], strict=True):
        i = slot(*here)
        qkv, out = saved.qkv[i].view(B, S, 3 * D), saved.attention[i].view(B, S, D)
        attend(qkv, out, saved.lse[i], settings.n_heads)
        rows.launch(*arguments(here, following))
