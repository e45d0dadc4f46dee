"""Loops that stop when they are enough: each prompt by itself, with or without acceleration.

A step may be one of plain iteration, z <- f(z), or of Anderson's method, which starts the next step
from a mix of the last ones (Anderson 1965; Walker and Ni 2011, "Anderson acceleration for
fixed-point iterations"). Both run f once a step, so their loop counts compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-6  # of Anderson's least squares, relative to the mean square of the residuals


class Snapshot(NamedTuple):
    """What a criterion sees of prompts after a step.

    Attributes:
        state: z, [B, S, D].
        outputs: predictions [B, n, 1] at the x positions or the queries, or logits [B, n, 2].
    """

    state: Tensor
    outputs: Tensor


Criterion = Callable[[Snapshot, Snapshot], Tensor]  # (after a step, before it) -> [B]


class AdaptivePrediction(NamedTuple):
    """The result of ``LoopedTransformer.predict`` with a tolerance.

    Attributes:
        predictions: [B, n], of the step at which each prompt stopped; logits are [B, n, 2].
        n_loops: [B] int64, the steps that each prompt ran.
    """

    predictions: Tensor
    n_loops: Tensor


def prediction_change(now: Snapshot, before: Snapshot) -> Tensor:
    """The largest change of a prompt's predictions (or logits): [B]."""
    return (now.outputs - before.outputs).abs().flatten(1).amax(1)


def state_change(now: Snapshot, before: Snapshot) -> Tensor:
    """The norm of the change of a prompt's state over the norm of the state: [B]."""
    difference, state = (now.state - before.state).flatten(1), now.state.flatten(1)
    return difference.norm(dim=1) / state.norm(dim=1)


def kl_divergence(now: Snapshot, before: Snapshot) -> Tensor:
    """The largest KL divergence of a prompt's class probabilities from those before: [B].

    Raises:
        ValueError: the model does not classify.
    """
    if now.outputs.shape[-1] == 1:
        raise ValueError(
            "kl_divergence compares class probabilities, but the model predicts numbers; use "
            "prediction_change"
        )
    log_p, log_q = before.outputs.log_softmax(-1), now.outputs.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).amax(1)


class Anderson:
    """Anderson acceleration of depth m, for each prompt by itself.

    The next step starts from the mix sum_i a_i f(z_i) of the last m + 1 steps, with the weights
    sum_i a_i = 1 whose mixed residual sum_i a_i (f(z_i) - z_i) is least.

    Args:
        depth: m, at least 1.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._n_steps = 0
        # Of the last m + 1 steps, in a ring: [B, m + 1, S D].
        self._stepped: Tensor | None = None  # f(z)
        self._residuals: Tensor | None = None  # f(z) - z

    def mix(self, state: Tensor, stepped: Tensor) -> Tensor:
        """Where the next step starts: [B, S, D], from z and f(z) of this one."""
        size = self.depth + 1
        if self._stepped is None or self._residuals is None:
            self._stepped = stepped.new_empty(len(stepped), size, stepped[0].numel())
            self._residuals = torch.empty_like(self._stepped)
        slot = self._n_steps % size
        self._n_steps += 1
        self._stepped[:, slot] = stepped.flatten(1)
        torch.sub(stepped.flatten(1), state.flatten(1), out=self._residuals[:, slot])
        k = min(self._n_steps, size)
        residuals = self._residuals[:, :k]
        gram = torch.bmm(residuals, residuals.mT).double()  # [B, k, k]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(1, keepdim=True).clamp_min(1e-300)
        weights = torch.linalg.solve(gram, torch.ones_like(gram[..., :1]))  # [B, k, 1]
        weights = (weights / weights.sum(1, keepdim=True)).to(stepped.dtype)
        return torch.bmm(weights.mT, self._stepped[:, :k]).view_as(stepped)

    def keep(self, rows: Tensor) -> None:
        """Keep only these prompts."""
        if self._stepped is not None and self._residuals is not None:
            self._stepped, self._residuals = self._stepped[rows], self._residuals[rows]


def run_until(
    step: Callable[[Tensor, Tensor], Tensor],
    read_out: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    state: Tensor,
    *,
    max_loops: int,
    tolerance: float | None,
    criterion: Criterion,
    anderson: int,
) -> tuple[Tensor, Tensor]:
    """Run steps until each prompt's criterion is below the tolerance.

    A prompt that has stopped leaves the batch.

    Args:
        step: (z, embeddings) -> f(z), all [B, S, D]; of any of the prompts.
        read_out: states -> outputs [B, n, n_outputs].
        embeddings: of the prompts, [B, S, D].
        state: z before the first step, [B, S, D].
        max_loops: most steps, at least 1.
        tolerance: None to run ``max_loops`` steps.
        criterion: compares each step's snapshot with that of the step before, from the second on.
        anderson: depth of the acceleration; 0 for plain iteration.

    Returns:
        Outputs [B, n, n_outputs] and the steps run, [B] int64.
    """
    rows = torch.arange(len(embeddings), device=embeddings.device)  # prompts that still run
    n_loops = torch.full_like(rows, max_loops)
    mixer = Anderson(anderson) if anderson else None
    outputs: Tensor | None = None
    before: Snapshot | None = None
    for i in range(1, max_loops + 1):
        stepped = step(state, embeddings)
        now = Snapshot(stepped, read_out(stepped))
        if outputs is None:
            outputs = torch.empty_like(now.outputs)
        state = stepped if mixer is None else mixer.mix(state, stepped)
        if tolerance is not None and before is not None:
            change = criterion(now, before)
            if change.shape != rows.shape:
                raise ValueError(
                    f"the criterion returned shape {tuple(change.shape)}; a number for each prompt "
                    f"is needed, [{len(rows)}]"
                )
            done = change < tolerance
            if done.any():
                outputs[rows[done]], n_loops[rows[done]] = now.outputs[done], i
                left = (~done).nonzero()[:, 0]
                if len(left) == 0:
                    return outputs, n_loops
                rows, embeddings, state = rows[left], embeddings[left], state[left]
                now = Snapshot(now.state[left], now.outputs[left])
                if mixer is not None:
                    mixer.keep(left)
        before = now
    assert outputs is not None
    assert before is not None
    outputs[rows] = before.outputs
    return outputs, n_loops
