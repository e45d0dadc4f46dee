"""The forward of the loop: two launches for every block, attention and the row kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from looped_fast.ops.call import LoopSettings
from looped_fast.ops.reference import AUTOCAST_DTYPES

from . import few_rows
from .after_norm_forward import after_norm_forward_kernel
from .candidates import Config, operand_precision
from .few_rows import Arguments, FewRows
from .fold import fold, pack
from .launch import launch
from .providers import PROVIDERS
from .row_forward import row_forward_kernel
from .saved_activations import SavedActivations, empty_saved, with_scratch
from .tuning import choose


class Injected(NamedTuple):
    """What the blocks take in beside the state; None: there is none."""

    scale: Tensor | None  # [B, S, D]: factor at a step's start
    shift: Tensor | None  # [B, S, D]: summand at a step's start
    inner_shift: Tensor | None  # [B, S, D]: summand between the blocks of a step
    tables: Tensor | None  # [2, S, D / H]: of rotary positions


class ReadOut(NamedTuple):
    """Predictions of the last steps, and the Linear that makes them."""

    weight: Tensor  # [n_outputs, D]
    bias: Tensor  # [n_outputs]
    targets: Tensor | None  # [B, ceil(S / 2), n_outputs]: those of the even tokens
    predictions: Tensor  # out [R, B, S, n_outputs]; errors, which are 0 at odd tokens, with targets


def injected(embeddings: Tensor, positions: Tensor | None, settings: LoopSettings) -> Injected:
    """Make ``Injected`` of ``embeddings`` [B, S, D] and the positions of ``ops.loop``."""
    injection, kind = settings.injection, settings.block.positions
    shift = embeddings if injection in ("add", "every_block") else None
    if kind == "learned" and positions is not None:
        expanded = positions.expand_as(embeddings)
        shift = expanded.contiguous() if shift is None else shift + positions
    return Injected(
        scale=embeddings if injection == "mul" else None,
        shift=shift,
        inner_shift=embeddings if injection == "every_block" else None,
        tables=positions if kind == "rotary" else None,
    )


def loop_forward(
    embeddings: Tensor,
    positions: Tensor | None,
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
    block, window = settings.block, settings.window
    operand = AUTOCAST_DTYPES[settings.precision] or torch.float32
    saved = empty_saved(
        embeddings, block.n_layer(len(weights)), settings, operand, save_activations, save_start,
        save_states,
    )  # fmt: skip
    if block.norm_place == "after":
        pack(weights, saved.folded_weights)
    else:
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
        embeddings,
        state,
        saved if save_activations else with_scratch(saved, embeddings, settings),
        injected(embeddings, positions, settings),
        weights[len(weights) - block.n_final_weights :],
        settings,
        save_activations,
        states if len(states) else None,
        reading,
    )
    return result, saved


class Rows:
    """Launches of GPT-2's row kernel, with tiles that suit the number of rows."""

    kernel = row_forward_kernel

    def __init__(
        self,
        like: Tensor,  # [B, S, D] fp32
        operand: torch.dtype,
        settings: LoopSettings,
        common: tuple[Arguments, Arguments, Arguments],  # most frequent of ``launch``
    ) -> None:
        self.x, self.S, self.D = torch.empty_like(like), *like.shape[-2:]
        self.n_rows, self.settings = like[..., 0].numel(), settings
        precision = operand_precision(operand)
        self.tf32 = precision == "tf32"
        self.config = choose(
            self.kernel,
            width=self.D,
            precision=precision,
            n_rows=self.n_rows,
            device=like.device,
            run=lambda config: self._launch(config, *common),
        )

    def launch(self, head: Arguments, step_end: Arguments, tail: Arguments) -> None:
        """Launch from one attention to the next."""
        self._launch(self.config, head, step_end, tail)

    def _launch(
        self, config: Config, head: Arguments, step_end: Arguments, tail: Arguments
    ) -> None:
        read_out_bias = step_end[6]
        launch(
            self.kernel, (triton.cdiv(self.n_rows, config.rows),), self.x, *head, *step_end, *tail,
            self.n_rows, self.S, config=config, D=self.D, TF32=self.tf32,
            OUTPUTS=0 if read_out_bias is None else len(read_out_bias),
        )  # fmt: skip


class AfterNormRows(Rows):
    """Launches of the row kernel of TRM's block."""

    kernel = after_norm_forward_kernel

    def _launch(
        self, config: Config, head: Arguments, step_end: Arguments, tail: Arguments
    ) -> None:
        block = self.settings.block
        launch(
            self.kernel, (triton.cdiv(self.n_rows, config.rows),), self.x, *head, *step_end, *tail,
            self.n_rows, self.S, block.norm_eps, config=config, D=self.D,
            HIDDEN=block.hidden(self.D), HEAD_DIM=self.D // self.settings.n_heads, TF32=self.tf32,
        )  # fmt: skip


class _Steps(NamedTuple):
    """What the arguments of launches are taken from; the fields are those of ``run_steps``."""

    state: Tensor | None
    saved: SavedActivations
    inputs: Injected
    norm: Sequence[Tensor]
    settings: LoopSettings
    save_activations: bool
    states: Tensor | None
    read_out: ReadOut | None

    def slot(self, step: int, block: int) -> int:
        """Slot of a step's block; steps before the window share those of its first step."""
        n_loops, window = self.settings.n_loops, self.settings.window
        return (block * window + max(step - (n_loops - window), 0)) % len(self.saved.qkv)

    def state_after(self, step: int) -> Tensor | None:
        """Where the state after a step is to go; None if it is not wanted."""
        w = step - (self.settings.n_loops - self.settings.window)
        if w >= 0:
            return None if self.states is None else self.states[w]
        return self.saved.start if w == -1 and len(self.saved.start) else None

    def injected(self, block: int) -> list[Tensor | None]:
        """Scale and shift of a block's input."""
        inputs = self.inputs
        return [inputs.scale, inputs.shift] if block == 0 else [None, inputs.inner_shift]


_Place = tuple[int, int] | None  # (step, block) of an attention; None before the first, after all


def _arguments(
    steps: _Steps, ends: _Place, begins: _Place
) -> tuple[Arguments, Arguments, Arguments]:
    """HEAD, STEP_END and TAIL of GPT-2's block, from one attention to the next."""
    saved = steps.saved
    head: list[Tensor | None] = [None] * 5
    middle: list[Tensor | None] = [None] * 9
    tail: list[Tensor | None] = [None] * 7
    if ends:
        (step, block), i = ends, steps.slot(*ends)
        head = [
            saved.attention[i], saved.folded_weights[block], saved.folded_biases[block],
            saved.xhat2[i], saved.rstd2[i],
        ]  # fmt: skip
        if block == len(saved.folded_weights) - 1:
            middle = _step_end(steps, step)
    else:
        middle[4] = steps.state
    if begins:
        (_, block), i = begins, steps.slot(*begins)
        tail = [
            *steps.injected(block), saved.folded_weights[block], saved.folded_biases[block],
            saved.xhat1[i], saved.rstd1[i], saved.qkv[i],
        ]  # fmt: skip
    return head, middle, tail


def _step_end(steps: _Steps, step: int) -> list[Tensor | None]:
    """Arguments of GPT-2's row kernel from ``norm_weight`` to ``targets``."""
    saved, window = steps.saved, steps.settings.window
    w = step - (steps.settings.n_loops - window)
    normed: list[Tensor | None] = [None, None]
    if w >= 0 and steps.save_activations:
        normed = [saved.xhatf[w], saved.rstdf[w]]
    until_state = [*steps.norm, *normed, steps.state_after(step)]
    read_out = steps.read_out
    if read_out is None or (i := w - window + len(read_out.predictions)) < 0:
        return [*until_state, None, None, None, None]
    return [
        *until_state, read_out.weight, read_out.bias, read_out.predictions[i], read_out.targets
    ]  # fmt: skip


def _after_norm_arguments(
    steps: _Steps, ends: _Place, begins: _Place
) -> tuple[Arguments, Arguments, Arguments]:
    """HEAD, STEP_END and TAIL of TRM's block, from one attention to the next."""
    saved = steps.saved
    head: list[Tensor | None] = [None] * 6
    state = steps.state
    tail: list[Tensor | None] = [None] * 6
    if ends:
        (step, block), i = ends, steps.slot(*ends)
        head = [saved.attention[i], saved.folded_weights[block], saved.xhat2[i], None, None, None]
        if steps.save_activations:
            head[3:] = [saved.rstd2[i], saved.xhatf[i], saved.rstdf[i]]
        is_last = block == len(saved.folded_weights) - 1
        state = steps.state_after(step) if is_last else None
    if begins:
        (_, block), i = begins, steps.slot(*begins)
        tail = [
            *steps.injected(block), saved.folded_weights[block], saved.xhat1[i],
            steps.inputs.tables, saved.qkv[i],
        ]  # fmt: skip
    return head, [state], tail


def run_steps(
    like: Tensor,
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
        like: gives B, S, D and the device.
        state: before the first step, [B, S, D]; None for the injection's neutral element.
        saved: with slots for all steps of the window if ``save_activations``, or scratch.
        inputs: what every step takes in.
        norm: scale and shift of the final LayerNorm, [D] each, if there is one.
        settings: the call's; ``n_loops`` steps run, and the last ``window`` give results.
        save_activations: True if a backward needs them.
        states: after the last steps, [W, B, S, D]; None: not wanted.
        read_out: makes predictions of these states; None: not wanted.
    """
    B, S, D = like.shape
    n_loops, window, n_layer = settings.n_loops, settings.window, len(saved.folded_weights)
    after_norm = settings.block.norm_place == "after"
    steps = _Steps(state, saved, inputs, norm, settings, save_activations, states, read_out)
    arguments = functools.partial(_after_norm_arguments if after_norm else _arguments, steps)

    rows: FewRows | Rows
    if not save_activations and not after_norm and B * S <= few_rows.MAX_ROWS:
        rows = FewRows(like, saved.qkv.dtype)
    else:
        n_wanted = window if read_out is None else len(read_out.predictions)
        step = n_loops - 1 if 2 * n_wanted > n_loops else 0
        common = arguments((step, n_layer - 1), (step, 0))
        rows = (AfterNormRows if after_norm else Rows)(like, saved.qkv.dtype, settings, common)
    attend, causal = PROVIDERS[settings.attention].forward, settings.block.mask == "causal"
    order = [(step, block) for step in range(n_loops) for block in range(n_layer)]
    rows.launch(*arguments(None, order[0]))
    for here, following in zip(order, [*order[1:], None], strict=True):
        i = steps.slot(*here)
        qkv, out = saved.qkv[i].view(B, S, 3 * D), saved.attention[i].view(B, S, D)
        attend(qkv, out, saved.lse[i], settings.n_heads, causal)
        rows.launch(*arguments(here, following))
