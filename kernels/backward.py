"""Host code of the loop's backward: which kernel runs on which tensors.

It goes through the window's steps in reverse, in chunks: as many steps as there is room for the
operands of their weight gradients, or one step if its activations are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from looped_fast.ops.block import Block
from looped_fast.ops.call import LoopSettings
from looped_fast.ops.reference import split_weights

from .after_norm_backward import after_norm_backward_kernel
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
    positions: Tensor | None,
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
        injected, for positions that are not added, and for a state that was None or lies before the
        window.
    """
    n_heads, n_loops, window, _, *_, block = settings
    L, D = block.n_layer(len(weights)), embeddings.shape[-1]
    states = saved.states
    start = state if window == n_loops else saved.start
    has_activations = len(saved.xhat1) > 0
    if has_activations:
        steps = steps_per_chunk(saved.xhat1, window, block)
    else:
        steps, saved = 1, with_scratch(saved, embeddings, settings, L)
        inputs, scratch = injected(embeddings, positions, settings), torch.empty_like(states[:1])
    outputs = empty_outputs(saved.xhat1, L, steps, block)
    shared = grad, start, embeddings, saved, outputs, settings
    rows: _GPT2Rows | _AfterNormRows
    if block.norm_place == "after":
        rows = _AfterNormRows(positions, *shared)
    else:
        rows = _GPT2Rows(weights, read_out, *shared)
    attend, causal = PROVIDERS[settings.attention].backward, block.mask == "causal"
    d_folded: list[Tensor | None] = []
    products = wanted_products(wanted[3:], L, block)

    for last in range(window, 0, -steps):
        first = max(0, last - steps)
        if has_activations:
            chunk = _select_steps(saved, L, first, last, block)
        else:
            before = states[first - 1] if first else start
            run_steps(
                embeddings, before, saved, inputs, weights[len(weights) - block.n_final_weights :],
                settings._replace(n_loops=1, window=1), save_activations=True, states=scratch,
            )  # fmt: skip
            chunk = _select_steps(saved, L, 0, 1, block)
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
                    rows.d_attended(here).view(*embeddings.shape[:2], 3 * D),
                    n_heads,
                    causal,
                )
                ends = here
        rows.launch(chunk, first, ends, None)
        d_chunk = folded_gradients(outputs, chunk, products)
        d_folded = list(map(_add, d_folded, d_chunk)) if d_folded else d_chunk

    grads: list[Tensor | None] = [
        rows.embeddings_gradient(),
        rows.positions_gradient(),
        rows.dx if window == n_loops and state is not None else embeddings.new_empty(0),
        *rows.weight_gradients(d_folded),
    ]
    pairs = zip(grads, wanted, strict=True)
    return [g if g is not None and flag else embeddings.new_empty(0) for g, flag in pairs]


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x + y


def _select_steps(
    saved: SavedActivations, n_layer: int, first: int, last: int, block: Block
) -> SavedActivations:
    """The activations of steps first .. last - 1 of the window, as [L, steps, ...] by block.

    Those of the final norm are [steps, ...], where it is the step's.
    """
    by_block = ["xhat1", "qkv", "attention", "lse", "xhat2", "rstd2"]
    by_block += ["rstd1"] if block.norm_place == "before" else ["xhatf", "rstdf"]
    by_step = ["xhatf", "rstdf"] if block.norm_place == "before" else []
    selected = {
        name: getattr(saved, name).unflatten(0, (n_layer, -1))[:, first:last] for name in by_block
    }
    selected |= {name: getattr(saved, name)[first:last] for name in by_step}
    return saved._replace(**selected)


Place = tuple[int, int]  # (block, step of the chunk)


class _Sums(NamedTuple):
    """fp32 sums over the rows of each of the P programs of GPT-2's row kernel."""

    d_biases: Tensor  # [L, W, P, 9D]: of the folded biases, in the order of ``fold.fold``
    d_norm: Tensor  # [W, 2, P, D]: of the final LayerNorm's scale and shift
    d_read_out: Tensor  # [R, P, n_outputs, D]: grad_predictions xhatf


class _Rows:
    """Launches of a row kernel over the whole window, and the tensors they share."""

    kernel: Any

    def __init__(
        self,
        grad: Tensor,  # [W, B, S, D], or of the predictions of R steps [R, B, S, n_outputs]
        start: Tensor | None,  # [B, S, D]: the state before the window; None: the neutral element
        embeddings: Tensor,  # [B, S, D]
        saved: SavedActivations,
        outputs: Outputs,
        settings: LoopSettings,
    ) -> None:
        self.without_grad = settings.window - len(grad)  # first steps
        self.grad, self.saved, self.start = grad, saved, start
        self.embeddings, self.settings, self.outputs = embeddings, settings, outputs
        self.weights = saved.folded_weights
        self.n_rows, self.D = embeddings[..., 0].numel(), embeddings.shape[-1]
        self.precision = operand_precision(self.weights.dtype)

        self.dx = torch.empty_like(embeddings)  # the residual's, and z's between chunks
        self.has_dx = False  # True once the window's last step has written it
        self.d_attention = torch.empty_like(embeddings, dtype=self.weights.dtype)
        # Gradients of ``forward.Injected``.
        injection, positions = settings.injection, settings.block.positions
        has_shift = positions == "learned" or injection in ("add", "every_block")
        self.d_shift = torch.zeros_like(embeddings) if has_shift else None
        self.d_inner_shift = torch.zeros_like(embeddings) if injection == "every_block" else None
        self.d_scale = torch.zeros_like(embeddings) if injection == "mul" else None

    def _choose(self) -> None:
        """Choose a configuration, for the most frequent form: between two steps."""
        L, steps = self.outputs.d_qkv.shape[:2]
        n, window = min(2, steps), self.settings.window
        chunk = _select_steps(self.saved, L, 0, n, self.settings.block)
        first = window - n if 2 * len(self.grad) > window else 0  # with a grad if most steps have
        self.config = choose(
            self.kernel,
            width=self.D,
            precision=self.precision,
            n_rows=self.n_rows,
            device=self.dx.device,
            run=lambda config: self._run(
                config, self._sums(config), chunk, first, (0, n - 1), (L - 1, 0)
            ),
        )
        self.sums = self._sums(self.config)

    def _sums(self, config: Config) -> Any:
        """Room for sums over the rows of each program, if the kernel makes any."""

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
        raise NotImplementedError

    def _dz(self, ends: Place | None) -> Tensor | None:
        """The gradient of the state from later steps, where no TAIL computes it."""
        return self.dx if ends is None and self.has_dx else None

    def _injected(self, block: int, w: int) -> list[Tensor | None]:
        """Arguments from ``d_shift`` to ``d_scale`` of a block in step w of the window."""
        if block > 0:
            return [self.d_inner_shift, None, None, None]
        if self.d_scale is None:
            return [self.d_shift, None, None, None]
        before = self.saved.states[w - 1] if w else self.start
        return [self.d_shift, self.embeddings, before, self.d_scale]

    def d_attended(self, place: Place) -> Tensor:
        """Where the attention backward puts the gradient of its input, [N, 3D]."""
        return self.outputs.d_qkv[place]

    def embeddings_gradient(self) -> Tensor | None:
        """Gradient of the embeddings, [B, S, D]; None if no step takes them in."""
        if self.settings.injection == "none":
            return None
        if self.d_scale is not None:
            return self.d_scale
        if self.d_shift is not None and self.d_inner_shift is not None:
            return self.d_shift + self.d_inner_shift
        return self.d_shift

    def positions_gradient(self) -> Tensor | None:
        """Gradient of positions that are added, [S, D]; None of others."""
        if self.settings.block.positions != "learned" or self.d_shift is None:
            return None
        return self.d_shift.sum(0)


class _GPT2Rows(_Rows):
    """Launches for GPT-2's block."""

    kernel = row_backward_kernel

    def __init__(
        self,
        weights: Sequence[Tensor],  # of ``ops.loop``
        read_out: Sequence[Tensor],  # weight and bias, if there are predictions
        *shared: Any,  # arguments of ``_Rows``
    ) -> None:
        super().__init__(*shared)
        self.blocks, self.norm = split_weights(weights)
        self.read_out = read_out
        self._choose()

    def _sums(self, config: Config) -> _Sums:
        P, D, steps = triton.cdiv(self.n_rows, config.rows), self.D, self.settings.window
        R, n_outputs = len(self.grad), len(self.read_out[1]) if self.read_out else 0
        d_biases = self.dx.new_empty(len(self.weights), steps, P, 9 * D)
        d_norm = self.dx.new_empty(steps, 2, P, D)
        return _Sums(d_biases, d_norm, self.dx.new_empty(R, P, n_outputs, D))

    def _run(self, config, sums, chunk, first, ends, begins) -> None:
        tail: list[Tensor | None] = [None] * 9
        step_end: list[Tensor | None] = [None] * 8
        head: list[Tensor | None] = [None] * 10
        n_outputs = 0
        if ends:
            block, step = ends
            w = first + step
            tail = [
                self.weights[block], self.outputs.d_qkv[ends], chunk.xhat1[ends], chunk.rstd1[ends],
                sums.d_biases[block, w], *self._injected(block, w),
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
                    self.norm["ln_f_weight"], chunk.xhatf[step], chunk.rstdf[step], sums.d_norm[w],
                    *outside,
                ]  # fmt: skip
            head = [
                self.weights[block], self.saved.folded_biases[block],
                chunk.xhat2[begins], chunk.rstd2[begins],
                self.outputs.dx2[begins], self.outputs.hidden[begins],
                self.outputs.d_hidden[begins], self.outputs.dx1[begins], self.d_attention,
                sums.d_biases[block, w],
            ]  # fmt: skip
        launch(
            self.kernel, (triton.cdiv(self.n_rows, config.rows),), self.dx, self._dz(ends), *tail,
            *step_end, *head, self.n_rows, config=config, D=self.D, OUTPUTS=n_outputs,
            TF32=self.precision == "tf32",
        )  # fmt: skip

    def weight_gradients(self, d_folded: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of all weights and of the read-out, given those of the folded weights."""
        D, sums = self.D, self.sums
        grads: list[Tensor | None] = []
        for i, block in enumerate(self.blocks):
            by_layer = sums.d_biases[i].split((3 * D, D, 4 * D, D), dim=-1)
            d_biases = [part.sum((0, 1)) for part in by_layer]
            grads += unfold(block, d_folded[4 * i : 4 * (i + 1)], d_biases)
        grads += [sums.d_norm[:, i].sum((0, 1)) for i in (0, 1)]
        if self.read_out:
            d_bias = self.grad.sum((0, 1, 2))  # [n_outputs]
            by_xhat = sums.d_read_out.sum((0, 1))  # with z before the final LayerNorm's scale
            weight, bias = self.norm["ln_f_weight"], self.norm["ln_f_bias"]
            grads += [by_xhat * weight + d_bias[:, None] * bias, d_bias]
        return grads


class _AfterNormRows(_Rows):
    """Launches for TRM's block."""

    kernel = after_norm_backward_kernel

    def __init__(self, positions: Tensor | None, *shared: Any) -> None:
        """``positions`` are those of ``ops.loop``; ``shared`` the arguments of ``_Rows``."""
        super().__init__(*shared)
        is_rotary = self.settings.block.positions == "rotary"
        self.tables = positions if is_rotary else None
        self.d_turned = torch.empty_like(self.outputs.d_qkv[0, 0]) if is_rotary else None
        self._choose()

    def d_attended(self, place: Place) -> Tensor:
        """As in ``_Rows``; the next launch turns queries and keys back."""
        return self.outputs.d_qkv[place] if self.d_turned is None else self.d_turned

    def _run(self, config, sums, chunk, first, ends, begins) -> None:
        tail: list[Tensor | None] = [None] * 8
        grad: Tensor | None = None
        head: list[Tensor | None] = [None] * 10
        if ends:
            block, step = ends
            d_qkv = None if self.d_turned is None else self.outputs.d_qkv[ends]
            tail = [
                self.weights[block], self.d_attended(ends), self.tables, d_qkv,
                *self._injected(block, first + step),
            ]  # fmt: skip
        if begins:
            block, step = begins
            is_last = block == len(self.weights) - 1
            if is_last and (i := first + step - self.without_grad) >= 0:
                grad = self.grad[i]
            head = [
                self.weights[block], chunk.xhat2[begins], chunk.rstd2[begins],
                chunk.xhatf[begins], chunk.rstdf[begins],
                self.outputs.dx2[begins], self.outputs.hidden[begins],
                self.outputs.d_hidden[begins], self.outputs.dx1[begins], self.d_attention,
            ]  # fmt: skip
        launch(
            self.kernel, (triton.cdiv(self.n_rows, config.rows),), self.dx, self._dz(ends), *tail,
            grad, *head, self.n_rows, self.embeddings.shape[1], config=config, D=self.D,
            HIDDEN=self.outputs.hidden.shape[-1], HEAD_DIM=self.D // self.settings.n_heads,
            TF32=self.precision == "tf32",
        )  # fmt: skip

    def weight_gradients(self, d_folded: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of all weights; nothing is folded into them."""
        return list(d_folded)
