"""Accuracy of a Tiny Recursive Model on puzzles, and its answers after each cycle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from looped_fast.model import TinyRecursiveModel
from looped_fast.tasks.sudoku import PADDING, PuzzleBatch

_CHUNK = 256  # puzzles in memory at once


@dataclass(frozen=True)
class Accuracy:
    """Shares of puzzles and cells that are right; padding is not counted.

    Attributes:
        cells: share of cells right after every supervision step, ``halt_max_steps``.
        solved: share of puzzles with all cells right then.
        solved_by_q: share of puzzles solved if each halts where ``q_halt`` is above 0 first.
        steps_by_q: mean supervision steps that it takes until then.
        solved_after: share of puzzles solved after each supervision step.
    """

    cells: float
    solved: float
    solved_by_q: float
    steps_by_q: float
    solved_after: list[float]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def solve_steps(model: TinyRecursiveModel, puzzles: PuzzleBatch) -> Accuracy:
    """Solve puzzles, halting never and by q, at the ambient precision.

    Args:
        model: it runs ``config.halt_max_steps`` supervision steps.
        puzzles: inputs and labels [B, S], on any device.
    """
    device, most = model.H_init.device, model.config.halt_max_steps
    right_cells, n_cells, solved, halts = 0, 0, [], []
    for inputs, labels in zip(*(t.to(device).split(_CHUNK) for t in puzzles), strict=True):
        carry, answers, halting = None, [], []
        asked = labels != PADDING
        for _ in range(most):
            output = model(inputs, carry, torch.zeros_like(inputs[:, 0]))
            carry = output.carry
            right = (output.logits.argmax(-1) == labels) | ~asked
            answers.append(right.all(-1))
            halting.append(output.q_halt > 0)
        right_cells += int((right & asked).sum())
        n_cells += int(asked.sum())
        solved.append(torch.stack(answers))
        halts.append(torch.stack(halting))
    is_solved, halting_now = torch.cat(solved, 1), torch.cat(halts, 1)  # [T, B]
    halting_now[-1] = True
    last = halting_now.int().argmax(0, keepdim=True)  # the first step at which each halts
    return Accuracy(
        cells=right_cells / n_cells,
        solved=is_solved[-1].double().mean().item(),
        solved_by_q=is_solved.gather(0, last).double().mean().item(),
        steps_by_q=(last + 1).double().mean().item(),
        solved_after=is_solved.double().mean(1).tolist(),
    )


@torch.no_grad()
def answers_by_cycle(model: TinyRecursiveModel, inputs: Tensor) -> Tensor:
    """Answers to puzzles [B, S] after each cycle of all supervision steps: [C, B, S], on the CPU.

    A supervision step of ``H_cycles`` cycles computes what as many steps of one cycle do.
    """
    config = model.config
    one_cycle = TinyRecursiveModel(dataclasses.replace(config, H_cycles=1), model.backend)
    one_cycle.to(model.H_init.device).load_state_dict(model.state_dict())
    inputs, carry, answers = inputs.to(model.H_init.device), None, []
    for _ in range(config.halt_max_steps * config.H_cycles):
        output = one_cycle(inputs, carry, torch.zeros_like(inputs[:, 0]))
        carry = output.carry
        answers.append(output.logits.argmax(-1))
    return torch.stack(answers).cpu()


def accuracy_table(accuracies: dict[str, Accuracy]) -> str:
    """A table of the accuracy of each run."""
    headers = ["run", "cells right", "puzzles solved", "solved, halting by q", "steps by q"]
    rows = [
        (name, f"{a.cells:.2%}", f"{a.solved:.2%}", f"{a.solved_by_q:.2%}", f"{a.steps_by_q:.2f}")
        for name, a in accuracies.items()
    ]
    return tabulate(rows, headers, colalign=("left", *["right"] * 4), disable_numparse=True)
