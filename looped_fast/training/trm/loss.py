"""The loss of a supervision step.

Source: ``models/losses.py`` of TinyRecursiveModels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from looped_fast.model import TRMOutput
from looped_fast.tasks.sudoku import PADDING

_EPSILON = 1e-30  # the public code's


class Loss(NamedTuple):
    """Means over the puzzles of a batch, and what is right in it."""

    total: Tensor  # float32, the cells' loss and half of that of halting
    cells: Tensor
    halting: Tensor
    right: Tensor  # [B, S] bool, true for padding


def log_stablemax(logits: Tensor) -> Tensor:
    """Log-probabilities s(x_i) / sum_j s(x_j) of logits [..., V], float64.

    s(x) = x + 1 for x >= 0, and 1 / (1 - x) below: unlike exp, it can't overflow, and it rewards
    large logits little. Source: arXiv 2501.04697.
    """
    x = logits.double()
    s = torch.where(x < 0, 1 / (1 - x + _EPSILON), x + 1)
    return torch.log(s / s.sum(-1, keepdim=True))


def supervision_loss(output: TRMOutput, labels: Tensor) -> Loss:
    """Loss of a supervision step's output against the solutions [B, S].

    The cells' loss is the cross entropy of ``log_stablemax``, averaged over the cells of a puzzle
    that are no padding. Halting is to be predicted, by ``q_halt``, if all of these are right.
    """
    asked = labels != PADDING
    entropy = -log_stablemax(output.logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    cells = ((entropy * asked).sum(-1) / asked.sum(-1).clamp(min=1)).mean()
    right = (output.logits.argmax(-1) == labels) | ~asked
    solved = right.all(-1).to(output.q_halt.dtype)
    halting = binary_cross_entropy_with_logits(output.q_halt, solved)
    return Loss((cells + 0.5 * halting).float(), cells, halting, right)
