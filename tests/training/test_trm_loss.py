"""The loss of a supervision step against the formulas, in float64 and by plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from looped_fast.model import Carry, TRMOutput
from looped_fast.training.trm.loss import log_stablemax, supervision_loss

B, S, V = 3, 5, 4


def output(logits, q_halt):
    return TRMOutput(
        Carry(torch.zeros(1), torch.zeros(1)), logits, q_halt, torch.zeros(len(q_halt))
    )


def stablemax(logits: list[float]) -> list[float]:
    """Probabilities by the formula of arXiv 2501.04697."""
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in logits]
    return [x / sum(s) for x in s]


def expected(logits, q_halt, labels) -> tuple[float, float]:
    """Loss of the cells and of halting, by loops over puzzles and cells."""
    cells, halting = 0.0, 0.0
    for puzzle, q, label in zip(logits.tolist(), q_halt.tolist(), labels.tolist(), strict=True):
        asked = [(row, token) for row, token in zip(puzzle, label, strict=True) if token]
        cells -= sum(math.log(stablemax(row)[token]) for row, token in asked) / len(asked)
        solved = all(row.index(max(row)) == token for row, token in asked)
        p = 1 / (1 + math.exp(-q))
        halting -= math.log(p if solved else 1 - p)
    return cells / len(logits), halting / len(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_that_of_the_formulas(dtype, padded):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(B, S, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(1, V, (B, S), generator=generator)
    labels[0] = logits[0, :, 1:].argmax(-1) + 1
    logits[0, :, 0] = -9.0  # puzzle 0 is solved
    if padded:
        labels[:, -2:] = 0
    q_halt = torch.randn(B, generator=generator)
    loss = supervision_loss(output(logits.to(dtype), q_halt), labels)
    cells, halting = expected(logits.to(dtype), q_halt, labels)
    assert loss.cells.item() == pytest.approx(cells, rel=1e-12)
    assert loss.halting.item() == pytest.approx(halting, rel=1e-6)  # q is float32
    assert loss.total.item() == pytest.approx(cells + 0.5 * halting, rel=1e-6)
    assert loss.right.all(-1).tolist() == [True, False, False]
    assert loss.right[:, -2:].all() if padded else not loss.right[1:].all()


@pytest.mark.parametrize("large", [1e4, 1e30])
def test_large_logits_overflow_nothing(large):
    logits = torch.tensor([[large, -large, 0.0]], dtype=torch.float32, requires_grad=True)
    log_p = log_stablemax(logits)
    log_p[0, 1].backward()
    assert log_p.dtype == torch.float64
    assert log_p.isfinite().all()
    assert logits.grad.isfinite().all()
    assert log_p.exp().sum().item() == pytest.approx(1)


def test_the_gradient_is_that_of_the_formula():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_stablemax, logits)


def test_an_answer_is_judged_before_its_gradient():
    """The target of halting has no gradient: only q_halt gets one from it."""
    logits = torch.randn(B, S, V, requires_grad=True)
    q_halt = torch.zeros(B, requires_grad=True)
    supervision_loss(output(logits, q_halt), torch.ones(B, S, dtype=torch.int64)).halting.backward()
    assert logits.grad is None
    assert (q_halt.grad > 0).all()  # none is solved
