"""The tolerance rule of the project, applied to a contender: a wrong result is not timed."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Contender, PuzzleCase
from benchmarks.workload import Workload, forget_compiled

READ_OUTS = ("_read_out", "lm_head", "q_head")
FLOOR = 8 * torch.finfo(torch.float32).eps  # relative; rounding that any fp32 result may have


class WrongResult(RuntimeError):
    """A contender's error is larger than the rule allows."""


def check(case: Case | PuzzleCase, contender: Contender, mode: str, device: str = "cpu") -> None:
    """Check a contender on a batch of at most 4, at the case's own length and loop counts.

    Raises:
        WrongResult: names the tensor, its error and the limit.
    """
    case = dataclasses.replace(case, batch=min(case.batch, 4))
    limits = error_limits(case, contender.precision, mode, device)
    forget_compiled()
    check_results(Workload(case, contender, mode, device=device), limits)


class Limit(NamedTuple):
    """What a tensor should be, and how far off it may be."""

    truth: Tensor  # float64
    error: float  # relative, in the Frobenius norm


@functools.cache  # contenders in one process share them
def error_limits(
    case: Case | PuzzleCase, precision: str, mode: str, device: str
) -> dict[str, Limit]:
    """Limits by name of a tensor.

    An error may be twice that of plain PyTorch at ``precision``, a gradient's three times, plus
    ``FLOOR``. Gradients of the read-out are left out: they do not pass through the loop, and that
    of the bias nearly cancels.
    """
    plain_run = Workload(case, Contender("reference", precision), mode, device=device)
    # Recomputing leaves every value as it is, and in float64 saves gigabytes at a full batch.
    exact = Contender("reference", "fp32", recompute=True)
    truths = _results(Workload(case, exact, mode, torch.float64, device))
    plain = _results(plain_run)
    return {
        name: Limit(truth, _factor(name) * _error(plain[name], truth) + FLOOR)
        for name, truth in truths.items()
    }


def _factor(name: str) -> int:
    return 2 if name == "predictions" else 3


def check_results(run: Workload, limits: dict[str, Limit]) -> None:
    """Check predictions and gradients of ``run``, of a replay if it has graphs.

    Raises:
        WrongResult: names the tensor, its error and the limit.
    """
    if run.contender.graphs:
        _results(run)  # warms up; the next call may capture
        _results(run)
    results = _results(run)
    for name, limit in limits.items():
        error = _error(results[name], limit.truth)
        if not error <= limit.error:
            raise WrongResult(f"{name}: error {error:.1e}, at most {limit.error:.1e} is right")


def _results(run: Workload) -> dict[str, Tensor]:
    """Predictions, of an inference call if the loss has none, and gradients."""
    predictions = run.forward() if run.mode == "inference" else run.forward_backward()
    if predictions is None:
        predictions = run.forward(of_window=True)
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in run.model.named_parameters()
        if parameter.grad is not None and not name.startswith(READ_OUTS)
    }
    return {"predictions": predictions, **gradients}


def _error(tensor: Tensor, truth: Tensor) -> float:
    """Error relative to float64 ``truth``, in the Frobenius norm."""
    return ((tensor.double() - truth).norm() / truth.norm()).item()
