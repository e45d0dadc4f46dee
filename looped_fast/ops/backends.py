"""Which backend runs the loop: decided here, and nowhere else.

Backends that can run a problem are those without a reason against it; ``reference`` has none,
ever. ``auto`` takes the one that was measured fastest on this GPU (``backend_times``), or else the
first in the order of ``BACKENDS`` that no rule of ``_slower`` passes over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from looped_fast.ops import (
    backend_times,
    compiled_backend,
    cpu_engine,
    loop_autograd,
    triton_backend,
)
from looped_fast.ops.choice import Choice, choose


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
    device_index: int = 0
    replayed: bool = False  # as a CUDA graph
    training: bool = False  # with gradients; told apart where calls are replayed only


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
    "compiled": compiled_backend.unsupported,
    "reference": _why_not_reference,
}


# Who may compute attention on the triton backend: the names in kernels/providers.py.
ATTENTION = ("triton", "flash_attn", "sdpa")

# Width D from which a GPU's fp32 products are predicted to be faster in cuBLAS than in Triton.
# Triton multiplies without tensor cores and loads 3 bytes of shared memory for a multiply-add: a
# third of the peak. cuBLAS comes near the peak, but launches 25 kernels a step, which decides at
# small D. At D = 256 a step of 5248 tokens is predicted to take 0.44 ms in Triton, 0.27 in cuBLAS.
CUBLAS_WIDTH = 256


def able(problem: Problem) -> list[str]:
    """Backends that can run ``problem``, in the order of preference without measurement."""
    return [name for name, unsupported in BACKENDS.items() if unsupported(problem) is None]


def explain(problem: Problem, backend: str = "auto") -> Explanation:
    """Choose for ``problem``; ``backend`` forces one.

    Raises:
        ValueError: ``backend`` or ``problem.attention`` is unknown, or forced and unable; the
            reason is in the message.
    """
    obstacles = {name: unsupported(problem) for name, unsupported in BACKENDS.items()}
    if backend == "auto":
        slower = _slower(problem, [name for name, reason in obstacles.items() if reason is None])
        obstacles = {name: reason or slower.get(name) for name, reason in obstacles.items()}
    choice = choose("backend", backend, obstacles)
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
    if backend == "auto" and device == "cpu":
        obstacles["triton"] = obstacles["triton"] or _INTERPRETED
    return choose("backend", backend, obstacles)


_INTERPRETED = "interpreted kernels run only when asked for"


def _slower(problem: Problem, able: list[str]) -> dict[str, str]:
    """Backends that ``auto`` passes over although they are ``able`` to run ``problem``, and why.

    Measured times decide where there are any, predictions where there are none.
    """
    slower = {
        "compiled": "it runs when asked for, or on a GPU where a training run measured it faster: "
        "compiling for a new shape takes many seconds"
    }
    if problem.device != "cpu" and problem.attention != "auto":
        return slower  # asks for the triton backend, which alone has a choice of attention
    for name, reason in backend_times.failures(problem).items():
        if name != "reference":  # the last resort
            slower[name] = f"it failed when it was measured: {reason}"
    times = {name: t for name, t in backend_times.lookup(problem).items() if name in able}
    if times:
        fastest = min(times, key=times.__getitem__)
        what = "a training step" if problem.training else "an inference call"
        for name, milliseconds in times.items():
            slower[name] = (
                f"{milliseconds:.3g} ms {what} measured here, {fastest} takes {times[fastest]:.3g}"
            )
        slower.pop(fastest)
    elif problem.device == "cpu":
        slower["triton"] = _INTERPRETED
    elif backend_times.operands(problem) == "fp32" and problem.n_embd >= CUBLAS_WIDTH:
        slower["triton"] = (
            f"predicted slower than cuBLAS in fp32 at D = {problem.n_embd} (from {CUBLAS_WIDTH}); "
            f"backend='triton' forces it, and precision='bf16' or TF32 uses tensor cores"
        )
    return slower


_replayed: ContextVar[bool] = ContextVar("replayed", default=False)


@contextlib.contextmanager
def replaying(on: bool = True) -> Iterator[None]:
    """Inside, calls are those that a CUDA graph replays: ``auto`` goes by times of replays."""
    token = _replayed.set(on)
    try:
        yield
    finally:
        _replayed.reset(token)


def is_replayed() -> bool:
    """True inside ``replaying``."""
    return _replayed.get()
