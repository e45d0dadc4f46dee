"""Host code of the loop's backward: which kernel runs on what, and what is kept in between.

The window's steps are gone through in reverse, in chunks: as many steps as there is room for what
their weight gradients multiply, or one step where its activations have to be computed again because
the forward did not keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from looped_fast.kernels.forward import injected, run_steps
from looped_fast.kernels.history import History, with_scratch
from looped_fast.kernels.launch import launch
from looped_fast.kernels.providers import PROVIDERS
from looped_fast.kernels.row_backward import row_backward_kernel
from looped_fast.kernels.tuning import Config, choose, operand_precision
from looped_fast.kernels.weight_gradients import (
    Outputs,
    empty_outputs,
    folded_gradients,
    steps_per_chunk,
    unfold,
)
from looped_fast.reference import split_weights


def loop_backward(
    grad_states: Tensor,
    states: Tensor,
    history: History,
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    n_heads: int,
    n_loops: int,
    window: int,
    injection: str,
    attention: str,
) -> list[Tensor]:
    """Gradients of embeddings, positions, state and every weight, given those of the states.

    Args:
        grad_states: [W, B, S, D] fp32.
        states: what the forward returned, [W, B, S, D] fp32.
        history: what it kept; activations that it did not keep are computed again.
        embeddings, positions, state, weights, n_heads, n_loops, window, injection, attention: as
            the forward took them.

    Returns:
        fp32, in the order of the arguments. [0] for embeddings that are not injected, and for the
        state where the window does not reach the first step.
    """
    blocks, norm_weight, _ = split_weights(weights)
    L, D = len(blocks), embeddings.shape[-1]
    start = state if window == n_loops else history.start
    kept = history.xhat1.numel() > 0
    if kept:
        steps = steps_per_chunk(history.xhat1, window)
    else:
        steps, history = 1, with_scratch(history, embeddings, n_heads, L)
        inputs, scratch = injected(embeddings, positions, injection), torch.empty_like(states[:1])
    outputs = empty_outputs(history.xhat1, L, steps)
    rows = _Rows(grad_states, states, start, embeddings, norm_weight, history, outputs, injection)
    attend = PROVIDERS[attention].backward
    d_folded: list[Tensor] = []

    for last in range(window, 0, -steps):
        first = max(0, last - steps)
        if kept:
            saved = _of_steps(history, L, first, last)
        else:
            before = states[first - 1] if first else start
            run_steps(before, history, inputs, weights[-2:], n_heads, 1, attention, scratch)
            saved = _of_steps(history, L, 0, 1)
        ends = None  # (block, step of the chunk) whose attention backward came before
        for step in reversed(range(last - first)):
            for i in reversed(range(L)):
                here = i, step
                rows.launch(saved, first, ends, here)
                attend(
                    saved.qkv[here].view(*embeddings.shape[:2], 3 * D),
                    saved.attention[here].view_as(embeddings),
                    saved.lse[here],
                    rows.d_attention,
                    outputs.d_qkv[here].view(*embeddings.shape[:2], 3 * D),
                    n_heads,
                )
                ends = here
        rows.launch(saved, first, ends, None)
        of_chunk = folded_gradients(outputs, saved)
        d_folded = list(map(torch.add, d_folded, of_chunk)) if d_folded else of_chunk

    grads = [
        rows.embeddings_gradient(),
        rows.d_shift.sum(0),
        rows.dx if window == n_loops else state.new_empty(0),
    ]
    for i, block in enumerate(blocks):
        grads += unfold(block, d_folded[8 * i : 8 * (i + 1)])
    return [*grads, *(rows.d_norm[:, i].sum((0, 1)) for i in (0, 1))]


def _of_steps(history: History, n_layer: int, first: int, last: int) -> History:
    """The activations of steps first .. last - 1 of the window, as [L, steps, ...] by block."""
    names = ("xhat1", "rstd1", "qkv", "attention", "lse", "xhat2", "rstd2")
    by_block = {
        name: getattr(history, name).unflatten(0, (n_layer, -1))[:, first:last] for name in names
    }
    final = {name: getattr(history, name)[first:last] for name in ("xhatf", "rstdf")}
    return history._replace(**by_block, **final)


Place = tuple[int, int]  # (block, step of the chunk)


class _Rows:
    """The launches of the rows' kernel over the whole window, and what they hand on."""

    def __init__(
        self,
        grad_states: Tensor,  # [W, B, S, D]
        states: Tensor,  # [W, B, S, D]
        start: Tensor,  # [B, S, D]: the state before the window
        embeddings: Tensor,  # [B, S, D]
        norm_weight: Tensor,  # [D]
        history: History,
        outputs: Outputs,
        injection: str,
    ) -> None:
        self.grad_states, self.states, self.start = grad_states, states, start
        self.embeddings, self.norm_weight = embeddings, norm_weight
        self.weights, self.biases = history.folded_weights, history.folded_biases
        self.outputs, self.injection = outputs, injection
        self.n_rows, self.D = embeddings[..., 0].numel(), embeddings.shape[-1]
        precision = operand_precision(self.weights.dtype)
        self.tf32 = precision == "tf32"

        self.dx = torch.empty_like(embeddings)  # the residual's, and z's between chunks
        self.dz = grad_states[-1]  # z's, where a chunk begins
        self.d_attention = torch.empty_like(embeddings, dtype=self.weights.dtype)
        # Of what is injected, see ``forward.Injected``.
        self.d_shift = torch.zeros_like(embeddings)
        self.d_inner_shift = torch.zeros_like(embeddings) if injection == "every_block" else None
        self.d_scale = torch.zeros_like(embeddings) if injection == "mul" else None

        first, last = (0, 0), (len(self.weights) - 1, 0)
        saved = _of_steps(history, len(self.weights), 0, 1)
        self.config = choose(
            row_backward_kernel,
            width=self.D,
            precision=precision,
            n_rows=self.n_rows,
            device=embeddings.device,
            run=lambda config: self._run(config, saved, 0, first, last, self._d_norm(config, 1)[0]),
        )
        self.d_norm = self._d_norm(self.config, len(states))

    def _d_norm(self, config: Config, steps: int) -> Tensor:
        """The final norm's gradients, [steps, 2, programs, D]: each program writes its own."""
        programs = triton.cdiv(self.n_rows, config.rows)
        return self.dx.new_empty(steps, 2, programs, self.D)

    def launch(self, saved: History, first: int, ends: Place | None, begins: Place | None) -> None:
        """From the attention backward of one place to that of the place before it.

        Args:
            saved: activations of the chunk's steps, [L, steps, ...].
            first: step of the window with which the chunk begins.
            ends: whose attention backward came before; None where the chunk starts, at its end.
            begins: whose comes next; None where the chunk is done.
        """
        d_norm = None
        if begins and begins[0] == len(self.weights) - 1:
            d_norm = self.d_norm[first + begins[1]]
        self._run(self.config, saved, first, ends, begins, d_norm)
        self.dz = self.dx

    def _run(self, config, saved, first, ends, begins, d_norm) -> None:
        dz = self.dz if ends is None else None
        tail: list[Tensor | None] = [None] * 8
        step_end: list[Tensor | None] = [None] * 4
        head: list[Tensor | None] = [None] * 9
        if ends:
            block, step = ends
            w = first + step
            injected = [self.d_inner_shift, None, None, None]
            if block == 0:
                before = self.states[w - 1] if w else self.start
                dz = self.grad_states[w - 1] if w else None
                injected = [self.d_shift, None, None, None]
                if self.d_scale is not None:
                    injected = [self.d_shift, self.embeddings, before, self.d_scale]
            tail = [
                self.weights[block], self.outputs.d_qkv[ends], saved.xhat1[ends], saved.rstd1[ends],
                *injected,
            ]  # fmt: skip
        if begins:
            block, step = begins
            if block == len(self.weights) - 1:
                step_end = [self.norm_weight, saved.xhatf[step], saved.rstdf[step], d_norm]
            head = [
                self.weights[block], self.biases[block], saved.xhat2[begins], saved.rstd2[begins],
                self.outputs.dx2[begins], self.outputs.hidden[begins],
                self.outputs.d_hidden[begins], self.outputs.dx1[begins], self.d_attention,
            ]  # fmt: skip
        launch(
            row_backward_kernel, (triton.cdiv(self.n_rows, config.rows),), self.dx, dz, *tail,
            *step_end, *head, self.n_rows, config=config, D=self.D, TF32=self.tf32,
        )  # fmt: skip

    def embeddings_gradient(self) -> Tensor:
        """[B, S, D], or [0] where no step takes the embeddings in."""
        if self.injection == "none":
            return self.dx.new_empty(0)
        if self.d_scale is not None:
            return self.d_scale
        if self.d_inner_shift is not None:
            return self.d_shift + self.d_inner_shift
        return self.d_shift
