"""Which backend runs the loop: decided here, and nowhere else.

A backend is tried in the order of ``BACKENDS``; the first that has no reason against a problem
runs it. ``reference`` has none, ever, so there is always one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from looped_fast import cpu_engine, loop_autograd, triton_backend
from looped_fast.choice import Choice, choose


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
    attention: str = "auto"  # who computes it, see kernels/providers.py; triton backend only


@dataclass(frozen=True)
class Explanation(Choice):
    """What ``explain_backend`` returns: the backend that runs, and why each other does not."""

    attention: Choice | None = None  # the triton backend's choice of who computes attention

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.attention is None else f"{text}\n{self.attention}"


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
    return loop_autograd.why_not() or cpu_engine.why_not_precision(problem.precision)


def _why_not_reference(problem: Problem) -> str | None:
    return None


BACKENDS: dict[str, Callable[[Problem], str | None]] = {
    "triton": triton_backend.why_not,
    "cpu": _why_not_cpu,
    "reference": _why_not_reference,
}


# Who may compute attention on the triton backend: the names in kernels/providers.py.
ATTENTION = ("triton", "flash_attn", "sdpa")


def explain(problem: Problem, backend: str = "auto") -> Explanation:
    """Choose for ``problem``; ``backend`` forces one.

    Raises:
        ValueError: ``backend`` or ``problem.attention`` is unknown, or forced and unable; the
            reason is in the message.
    """
    obstacles = {name: why_not(problem) for name, why_not in BACKENDS.items()}
    choice = _choose(backend, problem.device, obstacles)
    attention = None
    if choice.chosen == "triton":
        from looped_fast.kernels import providers  # needs Triton

        attention = providers.explain(problem)
    elif problem.attention != "auto":
        raise ValueError(
            f"attention {problem.attention!r} needs the triton backend: "
            f"{choice.reasons['triton']}. Use attention='auto', or backend='triton'"
        )
    return Explanation(choice.kind, choice.chosen, choice.reasons, attention)


def choose_read_in(device: str, dtype: torch.dtype, width: int, backend: str = "auto") -> Choice:
    """Choose who embeds a prompt to ``width`` D: a kernel of ``triton``, or else plain PyTorch.

    Raises:
        ValueError: as ``explain``.
    """
    obstacles = dict.fromkeys(BACKENDS)
    obstacles["triton"] = triton_backend.why_not_tensors(device, dtype, width)
    return _choose(backend, device, obstacles)


def _choose(backend: str, device: str, obstacles: dict[str, str | None]) -> Choice:
    if backend == "auto" and device == "cpu" and "triton" in obstacles:
        obstacles["triton"] = obstacles["triton"] or "interpreted kernels run only when asked for"
    return choose("backend", backend, obstacles)
