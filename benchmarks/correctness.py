"""A wrong result is not timed: the tolerance rule of the project, applied to a contender."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks.cases import Case, Contender
from benchmarks.workload import Workload, fresh_compiler

FLOOR = 8 * torch.finfo(torch.float32).eps  # relative; rounding that any fp32 result may have


class WrongResult(RuntimeError):
    """A contender's numbers are off by more than the rule allows."""


def check(case: Case, contender: Contender, mode: str, device: str = "cpu") -> None:
    """Compare with float64, as plain PyTorch at the same precision compares with it.

    An error may be twice that of plain PyTorch, a gradient's three times, plus ``FLOOR``; on a
    batch of at most 4, and the case's own length and loop counts. Gradients of the read-out are
    left out: they do not pass through the loop, and the bias's nearly cancels. Of a contender
    with CUDA graphs a replay is checked. Where a loss has no predictions, those of an inference
    call are compared beside its gradients.

    Raises:
        WrongResult: names the tensor, its error and the limit.
    """
    case = dataclasses.replace(case, batch=min(case.batch, 4))
    eager = Contender("reference", contender.precision)
    exact_eager = dataclasses.replace(eager, precision="fp32")
    exact = _results(case, exact_eager, mode, device, torch.float64)
    plain = _results(case, eager, mode, device)
    results = _results(case, contender, mode, device)
    for name, truth in exact.items():
        factor = 2 if name == "predictions" else 3
        limit = factor * _error(plain[name], truth) + FLOOR
        error = _error(results[name], truth)
        if not error <= limit:
            raise WrongResult(f"{name}: error {error:.1e}, at most {limit:.1e} is right")


def _results(
    case: Case,
    contender: Contender,
    mode: str,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    with fresh_compiler(contender):
        run = Workload(case, contender, mode, dtype, device)
        predict = run.forward if mode == "inference" else run.forward_backward
        if contender.graphs:
            predict()  # warms up
            predict()  # captures
        predictions = predict()
        if predictions is None:
            predictions = run.forward(case.window)
    results = {"predictions": predictions}
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None and not name.startswith("_read_out"):
            results[f"gradient of {name}"] = parameter.grad
    return results


def _error(tensor: Tensor, truth: Tensor) -> float:
    """Relative, in the Frobenius norm, of [...] against float64 [...]."""
    return ((tensor.double() - truth).norm() / truth.norm()).item()
