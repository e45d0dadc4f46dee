"""Microseconds of a loop step for every tile configuration, each checked before it may win."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
from looped_fast.kernels import few_rows
from looped_fast.kernels.candidates import Config, architecture

from benchmarks.cases import Case
from benchmarks.gpu.accuracy import copied, leaves, loop_arguments, worst_error
from benchmarks.gpu.configurations import KERNELS, configurations, forced
from benchmarks.gpu.timing import milliseconds, on_capturing_stream
from benchmarks.gpu.visit import Visit, say
from looped_fast import ops

OPTIONS = {"backend": "triton", "precision": "bf16"}
STEPS = 10  # loop steps that are timed together


def run(visit: Visit) -> None:
    """Time all configurations; save a table, and the best of each kernel by case."""
    table: dict[str, dict[str, Any]] = {}
    best: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in visit.cases}
    for kernel in KERNELS[:2] if visit.dry else KERNELS:
        fastest: dict[str, float] = {}
        for config in _configurations(kernel, visit):
            row = measured(kernel, config, visit)
            table[f"{kernel} {config.astuple()}"] = row
            say(f"{kernel.removesuffix('_kernel'):18} {config.astuple()!s:22}",
                ", ".join(f"{name} {_short(value)}" for name, value in row.items()))  # fmt: skip
            for case in visit.cases if row.get("error", 2) <= 1 else ():
                if row.get(case, torch.inf) < fastest.get(case, torch.inf):
                    fastest[case], best[case][kernel] = row[case], config.astuple()
            visit.save("rows", us_per_loop_step=table, best=best)
    row = table["few_rows"] = measured_few_rows(visit)
    say("few_rows", ", ".join(f"{name} {_short(value)}" for name, value in row.items()))
    visit.save("rows", us_per_loop_step=table, best=best)
    for case, configs in best.items():
        say(f"best at {case}:", ", ".join(f"{k.removesuffix('_kernel')} {c}"
                                          for k, c in configs.items()))  # fmt: skip


def _short(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _configurations(kernel: str, visit: Visit) -> tuple[Config, ...]:
    case = visit.case("lr")
    width = case.n_embd // case.n_head if "attention" in kernel else case.n_embd
    found = configurations(kernel, architecture(visit.device), width, "bf16")
    return found[:1] if visit.dry else found


def measured(kernel: str, config: Config, visit: Visit) -> dict[str, Any]:
    """Worst error as a share of its limit, and us of a loop step by case; or the failure.

    A backward is timed in cases with training. Configurations that do not compile, or need more
    than the GPU has, are results too.
    """
    row: dict[str, Any] = {}
    checked = visit.case("lr")
    if not visit.dry:
        checked = dataclasses.replace(checked, batch=4, n_loops=15, window=15)
    any_size = mock.patch.object(few_rows, "MAX_ROWS", 0)  # even if there are few rows
    try:
        with forced({kernel: config.astuple()}), any_size:
            row["error"] = worst_error(checked, visit.device).share
            for name, case in visit.cases.items():
                if "forward" in kernel:
                    row[name] = forward_us(case, visit.device)
                elif "training" in case.modes:
                    row[name] = backward_us(case, visit.device)
    except Exception as error:
        row["failed"] = _failure(error)
    return row


def measured_few_rows(visit: Visit) -> dict[str, Any]:
    """Measure the kernels that replace ``row_forward_kernel`` at few rows, as in ``measured``."""
    row: dict[str, Any] = {}
    try:
        with forced({}):
            one_prompt = dataclasses.replace(visit.case("lr"), batch=1)
            row["error"] = worst_error(one_prompt, visit.device).share
            for name, case in visit.cases.items():
                if 2 * case.batch * case.n_points <= few_rows.MAX_ROWS:
                    row[name] = forward_us(case, visit.device)
    except Exception as error:
        row["failed"] = _failure(error)
    return row


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


def forward_us(case: Case, device: torch.device) -> float:
    """Time a step of the forward: half of them in the window, or of an inference call."""
    training = "training" in case.modes
    steps = min(STEPS, case.n_loops)
    window = max(1, steps // 2) if training else 1
    arguments = _arguments(case, device, steps, window, training)
    targets = arguments.pop("targets")

    def forward() -> object:
        if training:
            return ops.loop_mse(**arguments, targets=targets, **OPTIONS)
        with torch.no_grad():
            return ops.loop(**arguments, **OPTIONS)

    return 1e3 * milliseconds(forward, device) / steps


def backward_us(case: Case, device: torch.device) -> float:
    """Time a step of the backward, with its share of the weight gradients."""
    steps = min(STEPS, case.n_loops)
    arguments = _arguments(case, device, steps, steps, True)
    tensors = leaves(arguments)
    loss = on_capturing_stream(lambda: ops.loop_mse(**arguments, **OPTIONS), device)

    def backward() -> object:
        return torch.autograd.grad(loss, tensors, retain_graph=True)

    return 1e3 * milliseconds(backward, device) / steps


def _arguments(
    case: Case, device: torch.device, steps: int, window: int, training: bool
) -> dict[str, Any]:
    case = dataclasses.replace(case, n_loops=steps, window=window)
    return copied(loop_arguments(case, device), torch.float32, requires_grad=training)
