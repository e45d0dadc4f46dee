"""Which backend runs the loop: decided here, and nowhere else.

A backend is tried in the order of ``BACKENDS``; the first that has no reason against a problem
runs it. ``reference`` has none, ever, so there is always one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from looped_fast import cpu_engine
from looped_fast.errors import unknown_name


@dataclass(frozen=True)
class Problem:
    """All that the choice of a backend may depend on."""

    device: str  # device type: "cpu", "cuda", ...
    dtype: torch.dtype  # of embeddings and weights
    precision: str  # operands of matrix products: fp32, bf16, fp16
    batch: int  # B
    seq_len: int  # S, tokens
    n_embd: int  # D
    n_heads: int
    n_layer: int
    n_loops: int
    window: int
    injection: str


@dataclass(frozen=True)
class Explanation:
    """What ``explain_backend`` returns: the backend that runs, and why each other does not."""

    chosen: str
    reasons: dict[str, str]  # backend that does not run -> why

    def __str__(self) -> str:
        lines = [f"backend: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def _why_not_triton(problem: Problem) -> str | None:
    return "this version has no Triton kernels yet"


def _why_not_cpu(problem: Problem) -> str | None:
    D, head_dim = problem.n_embd, problem.n_embd // problem.n_heads
    if problem.device != "cpu":
        return f"tensors are on {problem.device}"
    if problem.dtype != torch.float32:
        return f"it takes float32 tensors, not {problem.dtype}"
    if D % 32 or D > cpu_engine.MAX_WIDTH:
        return f"D = {D} is not a multiple of 32 up to {cpu_engine.MAX_WIDTH}"
    if head_dim % 8:
        return f"head_dim = {head_dim} is not a multiple of 8"
    return cpu_engine.why_not_precision(problem.precision)


def _why_not_reference(problem: Problem) -> str | None:
    return None


BACKENDS: dict[str, Callable[[Problem], str | None]] = {
    "triton": _why_not_triton,
    "cpu": _why_not_cpu,
    "reference": _why_not_reference,
}


def explain(problem: Problem, backend: str = "auto") -> Explanation:
    """Choose for ``problem``; ``backend`` forces one.

    Raises:
        ValueError: ``backend`` is unknown, or forced and unable; the reason is in the message.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown_name("backend", backend, ["auto", *BACKENDS])
    reasons: dict[str, str] = {}
    chosen = None
    for name, why_not in BACKENDS.items():
        reason = why_not(problem)
        if reason is None and chosen is None and backend in ("auto", name):
            chosen = name
        elif reason is None:
            reason = f"{backend} was asked for" if backend != "auto" else f"{chosen} comes first"
            reasons[name] = reason
        else:
            reasons[name] = reason
    if chosen is None:
        raise ValueError(
            f"backend {backend!r} can't run this: {reasons[backend]}. "
            f"Use backend='auto', or see looped_fast.explain_backend"
        )
    return Explanation(chosen, reasons)
