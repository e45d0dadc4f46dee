"""The paper's ablations, as data: name -> the runs that answer one question.

A sweep takes the settings of the looped preset and returns, for each of its runs, a label and the
settings that differ, so that one sweep serves every scale. ``sweep.py`` runs and draws them.
Source: arXiv 2311.12424, sections 4 and 5 and the appendix on ablations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from looped_fast.training.config import TrainConfig

Runs = dict[str, dict[str, Any]]  # label -> settings over the preset


def loops_and_window(base: TrainConfig) -> Runs:
    """How many loops b to train with, and through how many of them, T, to backpropagate."""
    b, T = base.n_loops, base.window
    return {
        f"b={n_loops}, T={window}": _looped(n_loops, window)
        for n_loops in (b // 2, b, 2 * b)
        for window in (T // 2, T)
    }


def injection(base: TrainConfig) -> Runs:
    """Does every loop step need the prompt again, and should it be added or multiplied?"""
    return {
        "z + e": {"injection": "add"},
        "z * e": {"injection": "mul"},
        "no injection": {"injection": "none"},
    }


def layers(base: TrainConfig) -> Runs:
    """Blocks in a loop step."""
    return {f"{n} in a step": {"n_layer": n} for n in (1, 2, 3)}


def heads(base: TrainConfig) -> Runs:
    """Attention heads, at one width."""
    counts = (base.n_head // 2, base.n_head, 2 * base.n_head)
    return {f"{n} heads": {"n_head": n} for n in counts}


def width(base: TrainConfig) -> Runs:
    """Residual width D, with heads of one size."""
    head_dim = base.n_embd // base.n_head
    widths = (base.n_embd // 2, base.n_embd, 2 * base.n_embd)
    return {f"D={D}": {"n_embd": D, "n_head": D // head_dim} for D in widths}


def prompts(base: TrainConfig) -> Runs:
    """Distinct training prompts that a looped and a standard model need."""
    return {
        f"{model}, {'fresh' if n is None else n} prompts": {"model": model, "train_prompts": n}
        for model in ("looped", "standard")
        for n in (1_000, 10_000, 100_000, None)
    }


def loop_schedule(base: TrainConfig) -> Runs:
    """Should the loop count grow to b in training, from T or from 1, or be b from the start?"""
    b, T, growth = base.n_loops, base.window, base.curriculum.loops
    slow = {"start": T, "inc": growth.inc, "interval": 2 * growth.interval}
    from_one = {"start": 1, "inc": growth.inc, "interval": growth.interval}
    return {
        f"{T} to {b}": _looped(b, T),
        f"{T} to {b}, half as fast": _looped(b, T, slow),
        f"1 to {b}": _looped(b, T, from_one),
        f"{b} throughout": _looped(b, T, {"start": None}),
    }


def _looped(n_loops: int, window: int, growth: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings b and T, with a loop count that starts at T by default."""
    growth = {"start": window} if growth is None else growth
    return {"n_loops": n_loops, "window": window, "curriculum": {"loops": growth}}


SWEEPS: dict[str, Callable[[TrainConfig], Runs]] = {
    "loops_and_window": loops_and_window,
    "injection": injection,
    "layers": layers,
    "heads": heads,
    "width": width,
    "prompts": prompts,
    "loop_schedule": loop_schedule,
}
