"""Measured rates of memory and tensor cores, and times of cuBLAS at the loop's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.gpu.timing import milliseconds
from benchmarks.gpu.visit import Visit, say

REPEATED = 20  # small products that are timed at a time


def run(visit: Visit) -> None:
    """Print and save all values."""
    found = {}
    for name, value in _all(visit):
        found[name] = value
        say(f"{name:44} {value:10.1f}")
        visit.save("pieces", values=found)


def _all(visit: Visit) -> Iterator[tuple[str, float]]:
    yield from ceilings(visit)
    for name, case in visit.cases.items():
        if "training" in case.modes:
            yield from products(name, case, visit)
            yield from read_out(name, case, visit)


def ceilings(visit: Visit) -> Iterator[tuple[str, float]]:
    """Rates of a copy in device memory, and of a large product in bf16."""
    n_bytes, size = (2**10, 32) if visit.dry else (2**31, 8192)
    bytes_ = torch.empty(2, n_bytes, dtype=torch.uint8, device=visit.device)
    yield "copy, GB/s", 2 * n_bytes / _us(lambda: bytes_[0].copy_(bytes_[1]), visit) / 1e3
    matrices = _random(visit, 2, size, size)
    us = _us(lambda: matrices[0] @ matrices[1], visit)
    yield f"{size}^3 in bf16, TFLOP/s", 2 * size**3 / us / 1e6


def products(name: str, case: Case, visit: Visit) -> Iterator[tuple[str, float]]:
    """Time the linear layers of a loop step, and their gradients over a window."""
    n_rows, D = case.batch * 2 * case.n_points, case.n_embd
    layers = {"qkv": (3 * D, D), "out": (D, D), "fc": (4 * D, D), "proj": (D, 4 * D)}
    for layer, (n_out, n_in) in layers.items():
        yield f"{name}: {layer} by cuBLAS, us", linear_us(n_rows, n_in, n_out, visit)
        weight, bias = gradients_us(case.window * n_rows, n_in, n_out, visit)
        yield f"{name}: {layer} bias gradient of a window, us", bias
        if weight is not None:
            yield f"{name}: {layer} weight gradient of a window, us", weight


def linear_us(n_rows: int, n_in: int, n_out: int, visit: Visit) -> float:
    """Time [n_rows, n_in] by [n_out, n_in], with a bias, in bf16."""
    x, weight = _random(visit, n_rows, n_in), _random(visit, n_out, n_in)
    bias = _random(visit, n_out)

    def linear() -> None:
        for _ in range(REPEATED):
            F.linear(x, weight, bias)

    return _us(linear, visit) / REPEATED


def gradients_us(n_rows: int, n_in: int, n_out: int, visit: Visit) -> tuple[float | None, float]:
    """Time gradients of a weight (None in a dry run) and a bias: bf16 operands, fp32 results."""
    dy, x = _random(visit, n_rows, n_out), _random(visit, n_rows, n_in)
    bias = _us(lambda: dy.sum(0, dtype=torch.float32), visit)
    if visit.dry:  # out_dtype exists only on GPUs
        return None, bias
    return _us(lambda: torch.mm(dy.T, x, out_dtype=torch.float32), visit), bias


def read_out(name: str, case: Case, visit: Visit) -> Iterator[tuple[str, float]]:
    """Time read-out and loss of a window's states by PyTorch, forward and backward."""
    shape = (case.window, case.batch * 2 * case.n_points, case.n_embd)
    states = torch.randn(shape, device=visit.device, requires_grad=True)
    weight = torch.randn(1, case.n_embd, device=visit.device, requires_grad=True)
    bias = torch.randn(1, device=visit.device, requires_grad=True)

    def both_ways() -> None:
        loss = F.linear(states, weight, bias)[:, ::2].square().mean()
        torch.autograd.grad(loss, (states, weight, bias))

    yield f"{name}: read-out and loss by PyTorch, us", _us(both_ways, visit)


def _us(work: Callable[[], object], visit: Visit) -> float:
    return 1e3 * milliseconds(work, visit.device)


def _random(visit: Visit, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=visit.device)
