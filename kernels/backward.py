"""Host code of the loop's backward: which kernel runs on which tensors.

It goes through the window's steps in reverse, in chunks: as many steps as there is room for the
operands of their weight gradients, or one step if its activations are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from looped_fast.ops.call import LoopSettings
from looped_fast.ops.reference import split_weights

from .candidates import Config, operand_precision
from .forward import injected, run_steps
from .launch import launch
from .providers import PROVIDERS
from .row_backward import row_backward_kernel
from .saved_activations import SavedActivations, with_scratch
from .tuning import choose
from .weight_gradients import (
    Outputs,
    empty_outputs,
    folded_gradients,
    steps_per_chunk,
    unfold,
    wanted_products,
)


def loop_backward(
    grad: Tensor,
    saved: SavedActivations,
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    read_out: Sequence[Tensor],
    settings: LoopSettings,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of embeddings, positions, state, every weight and the read-out.

    Args:
        grad: gradient of what the forward returned: of states [W, B, S, D], or with a read-out of
            the predictions (errors) of the last R steps [R, B, S, n_outputs]; fp32.
        saved: what the forward saved; activations that it did not save are recomputed. States are
            needed for that, and for the injection ``mul``.
        embeddings, positions, state, weights, read_out, settings: as the forward took them.
        wanted: which gradients are. Products for those of weights run only where they are wanted.

    Returns:
        fp32, in the order of the arguments. Shape [0] where not wanted, for embeddings that are not
        injected, and for a state that was None or lies before the window.
    """
    blocks, final = split_weights(weights)
    L, D = len(blocks), embeddings.shape[-1]
    n_heads, n_loops, window, injection, *_ = settings
    states = saved.states
    start = state if window == n_loops else saved.start
    has_activations = len(saved.xhat1) > 0
    if has_activations:
        steps = steps_per_chunk(saved.xhat1, window)
    else:
        steps, saved = 1, with_scratch(saved, embeddings, n_heads, L)
        inputs, scratch = injected(embeddings, positions, injection), torch.empty_like(states[:1])
    outputs = empty_outputs(saved.xhat1, L, steps)
    norm_weight, norm_bias = final["ln_f_weight"], final["ln_f_bias"]
    rows = _Rows(
        grad, states, start, embeddings, norm_weight, read_out, saved, outputs, injection, window
    )
    attend = PROVIDERS[settings.attention].backward
    d_folded: list[Tensor | None] = []
    products = wanted_products(wanted[3:], L)

    for last in range(window, 0, -steps):
        first = max(0, last - steps)
        if has_activations:
            chunk = _select_steps(saved, L, first, last)
        else:
            before = states[first - 1] if first else start
            run_steps(
                before, saved, inputs, weights[-2:], settings._replace(n_loops=1, window=1),
                save_activations=True, states=scratch,
            )  # fmt: skip
            chunk = _select_steps(saved, L, 0, 1)
        ends = None  # (block, step of the chunk) whose attention backward came before
        for step in reversed(range(last - first)):
            for i in reversed(range(L)):
                here = i, step
                rows.launch(chunk, first, ends, here)
                attend(
                    chunk.qkv[here].view(*embeddings.shape[:2], 3 * D),
                    chunk.attention[here].view_as(embeddings),
                    chunk.lse[here],
                    rows.d_attention,
                    outputs.d_qkv[here].view(*embeddings.shape[:2], 3 * D),
                    n_heads,
                )
                ends = here
        rows.launch(chunk, first, ends, None)
        d_chunk = folded_gradients(outputs, chunk, products)
        d_folded = list(map(_add, d_folded, d_chunk)) if d_folded else d_chunk

    grads: list[Tensor | None] = [
        rows.embeddings_gradient(),
        rows.d_shift.sum(0),
        rows.dx if window == n_loops and state is not None else embeddings.new_empty(0),
    ]
    sums = rows.sums
    for i, block in enumerate(blocks):
        by_layer = sums.d_biases[i].split((3 * D, D, 4 * D, D), dim=-1)
        d_biases = [part.sum((0, 1)) for part in by_layer]
        grads += unfold(block, d_folded[4 * i : 4 * (i + 1)], d_biases)
    grads += [sums.d_norm[:, i].sum((0, 1)) for i in (0, 1)]
    if read_out:
        d_bias = grad.sum((0, 1, 2))  # [n_outputs]
        by_xhat = sums.d_read_out.sum((0, 1))  # with z before the final LayerNorm's scale
        grads += [by_xhat * norm_weight + d_bias[:, None] * norm_bias, d_bias]
    pairs = zip(grads, wanted, strict=True)
    return [g if g is not None and flag else embeddings.new_empty(0) for g, flag in pairs]


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x + y


def _select_steps(saved: SavedActivations, n_layer: int, first: int, last: int) -> SavedActivations:
    """The activations of steps first .. last - 1 of the window, as [L, steps, ...] by block."""
    names = ("xhat1", "rstd1", "qkv", "attention", "lse", "xhat2", "rstd2")
    by_block = {
        name: getattr(saved, name).unflatten(0, (n_layer, -1))[:, first:last] for name in names
    }
    final = {name: getattr(saved, name)[first:last] for name in ("xhatf", "rstdf")}
    return saved._replace(**by_block, **final)


Place = tuple[int, int]  # (block, step of the chunk)


class _Sums(NamedTuple):
    """fp32 sums over the rows of each of the P programs of the row kernel."""

    d_biases: Tensor  # [L, W, P, 9D]: of the folded biases, in the order of ``fold.fold``
    d_norm: Tensor  # [W, 2, P, D]: of the final LayerNorm's scale and shift
    d_read_out: Tensor  # [R, P, n_outputs, D]: grad_predictions xhatf


class _Rows:
    """Launches of the row kernel over the whole window, and the tensors they share."""

    def __init__(
        self,
        grad: Tensor,  # [W, B, S, D], or of the predictions of R steps [R, B, S, n_outputs]
        states: Tensor,  # [W, B, S, D]; [0] where the injection does not need them
        start: Tensor | None,  # [B, S, D]: the state before the window; None: the neutral element
        embeddings: Tensor,  # [B, S, D]
        norm_weight: Tensor,  # [D]
        read_out: Sequence[Tensor],  # weight and bias, if there are predictions
        saved: SavedActivations,
        outputs: Outputs,
        injection: str,
        window: int,
    ) -> None:
        self.without_grad = window - len(grad)  # first steps
        self.grad, self.states, self.start = grad, states, start
        self.embeddings, self.norm_weight, self.read_out = embeddings, norm_weight, read_out
        self.weights, self.biases = saved.folded_weights, saved.folded_biases
        self.outputs, self.injection = outputs, injection
        self.n_rows, self.D = embeddings[..., 0].numel(), embeddings.shape[-1]
        precision = operand_precision(self.weights.dtype)
        self.tf32 = precision == "tf32"

        self.dx = torch.empty_like(embeddings)  # the residual's, and z's between chunks
        self.has_dx = False  # True once the window's last step has written it
        self.d_attention = torch.empty_like(embeddings, dtype=self.weights.dtype)
        # Gradients of ``forward.Injected``.
        self.d_shift = torch.zeros_like(embeddings)
        self.d_inner_shift = torch.zeros_like(embeddings) if injection == "every_block" else None
        self.d_scale = torch.zeros_like(embeddings) if injection == "mul" else None

        L, steps = outputs.d_qkv.shape[:2]
        n = min(2, steps)
        chunk = _select_steps(saved, L, 0, n)
        first = window - n if 2 * len(grad) > window else 0  # with a grad if most steps have one

        def run(config: Config) -> None:  # the most frequent form: between two steps
            self._run(config, self._sums(config, window), chunk, first, (0, n - 1), (L - 1, 0))

        self.config = choose(
            row_backward_kernel,
            width=self.D,
            precision=precision,
            n_rows=self.n_rows,
            device=embeddings.device,
            run=run,
        )
        self.sums = self._sums(self.config, window)

    def _sums(self, config: Config, steps: int) -> _Sums:
        L, P, D = len(self.weights), triton.cdiv(self.n_rows, config.rows), self.D
        R, n_outputs = len(self.grad), len(self.read_out[1]) if self.read_out else 0
        empty = self.dx.new_empty
        return _Sums(empty(L, steps, P, 9 * D), empty(steps, 2, P, D), empty(R, P, n_outputs, D))

    def launch(
        self, chunk: SavedActivations, first: int, ends: Place | None, begins: Place | None
    ) -> None:
        """Launch the kernel between the attention backwards of two places.

        Args:
            chunk: activations of the chunk's steps, [L, steps, ...].
            first: step of the window with which the chunk begins.
            ends: place of the attention backward before the launch; None at the start of a chunk.
            begins: place of the one after the launch; None at the end of a chunk.
        """
        self._run(self.config, self.sums, chunk, first, ends, begins)
        self.has_dx = True

    def _run(self, config, sums, chunk, first, ends, begins) -> None:
        dz = self.dx if ends is None and self.has_dx else None
        tail: list[Tensor | None] = [None] * 9
        step_end: list[Tensor | None] = [None] * 8
        head: list[Tensor | None] = [None] * 10
        n_outputs = 0
        if ends:
            block, step = ends
            w = first + step
            injected = [self.d_inner_shift, None, None, None]
            if block == 0:
                injected = [self.d_shift, None, None, None]
                if self.d_scale is not None:
                    before = self.states[w - 1] if w else self.start
                    injected = [self.d_shift, self.embeddings, before, self.d_scale]
            tail = [
                self.weights[block], self.outputs.d_qkv[ends], chunk.xhat1[ends], chunk.rstd1[ends],
                sums.d_biases[block, w], *injected,
            ]  # fmt: skip
        if begins:
            block, step = begins
            w = first + step
            if block == len(self.weights) - 1:
                outside: list[Tensor | None] = [None] * 4
                if (i := w - self.without_grad) >= 0 and self.read_out:
                    n_outputs = self.grad.shape[-1]
                    outside = [None, self.grad[i], self.read_out[0], sums.d_read_out[i]]
                elif i >= 0:
                    outside[0] = self.grad[i]
                step_end = [
                    self.norm_weight, chunk.xhatf[step], chunk.rstdf[step], sums.d_norm[w],
                    *outside,
                ]  # fmt: skip
            head = [
                self.weights[block], self.biases[block], chunk.xhat2[begins], chunk.rstd2[begins],
                self.outputs.dx2[begins], self.outputs.hidden[begins],
                self.outputs.d_hidden[begins], self.outputs.dx1[begins], self.d_attention,
                sums.d_biases[block, w],
            ]  # fmt: skip
        launch(
            row_backward_kernel, (triton.cdiv(self.n_rows, config.rows),), self.dx, dz, *tail,
            *step_end, *head, self.n_rows, config=config, D=self.D, OUTPUTS=n_outputs,
            TF32=self.tf32,
        )  # fmt: skip

    def embeddings_gradient(self) -> Tensor:
        """Gradient of the embeddings, [B, S, D]; [0] if no step takes them in."""
        if self.injection == "none":
            return self.dx.new_empty(0)
        if self.d_scale is not None:
            return self.d_scale
        if self.d_inner_shift is not None:
            return self.d_shift + self.d_inner_shift
        return self.d_shift
