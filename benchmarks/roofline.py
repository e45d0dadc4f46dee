"""Predicts time per training step on a GPU that is not there: ``python -m benchmarks.roofline``.

**A prediction, not a measurement.** Our kernels are predicted from the compile report, by
``predicted_time``; PyTorch's ops from their shapes, see ``ASSUMPTIONS``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import predicted_time
from benchmarks.cases import CASES, Case
from benchmarks.compile_store import Group, Report, candidates, load
from benchmarks.kernel_launches import form_of, weights_of
from benchmarks.predicted_time import GRAPH_START, H100, Gpu
from benchmarks.work import CountingOps, Op, compiled, is_product
from looped_fast import reference
from looped_fast.kernels import backward, forward, tuning
from looped_fast.kernels.launch import Launch, recording
from looped_fast.kernels.tuning import Config

# The best tiles without wgmma, which take 64 rows or more; ours are held against them.
SHORT = {
    "row_forward_kernel": Config(32, 32, 32, 4),
    "row_backward_kernel": Config(32, 64, 64, 8),
}
HALF_RATE = 320  # a product that sums over so many terms reaches half of the matrix rate
L2_SIZE = 50e6  # bytes
# Read-in, loss, clipping and optimizer of every contender, and the read-out of PyTorch's: little
# more for them than for our kernels, which read out as they go.
SMALL_LAUNCHES = 100
ASSUMPTIONS = f"""Prediction for one {H100.name}, bf16, from counted work and these assumptions:
- our kernels: benchmarks/predicted_time.py, in the candidates that take least at the case's size;
  a form that was not compiled counts as the one that does most;
- PyTorch's products that sum over K terms reach K / (K + {HALF_RATE}) of
  {H100.flops / 1e12:.0f} TFLOP/s;
- PyTorch's other ops move their tensors at the speed of DRAM, {H100.bandwidth / 1e12:.1f} TB/s, or
  of the L2 cache, {H100.l2_bandwidth / 1e12:.1f}, where all of them fit into half of it;
- PyTorch's attention takes as long as ours, which favours PyTorch;
- a compiled step has one kernel between two products;
- a kernel of a CUDA graph takes {1e6 * GRAPH_START:.1f} us or more, and {SMALL_LAUNCHES} of these
  are added for everything outside the loop."""


class Part(NamedTuple):
    """A kernel of a step."""

    name: str
    seconds: float


def ours(case: Case, report: Report, version: str, configs: dict[str, Config]) -> list[Part]:
    """What the Triton backend launches for the loop of a training step.

    Args:
        case: the size.
        report: the compile report.
        version: of Triton, whose entries count.
        configs: kernel -> configuration, for those that are not to be the best predicted.
    """
    with recording(execute=False) as launches, CountingOps() as ops:
        _run(case)
    parts = []
    for name in dict.fromkeys(launch.name for launch in launches):
        same = [launch for launch in launches if launch.name == name]
        options = [configs[name]] if name in configs else _candidates(report, same[0])
        times = [_kernel(case, report, version, same, config) for config in options]
        best = min(times, key=lambda found: sum(part.seconds for part in found))
        parts += best
    return parts + list(torch_parts(ops.ops, parts))


def _candidates(report: Report, launch: Launch) -> list[Config]:
    if launch.name.startswith(("row_", "attention_")):
        return candidates(report)[_group(launch)]
    return [launch.config]


def _group(launch: Launch) -> Group:
    width = launch.constexprs.get("HEAD_DIM", launch.constexprs.get("D"))
    return Group(launch.name, H100.arch, width, "bf16")


def _kernel(
    case: Case, report: Report, version: str, launches: list[Launch], config: Config
) -> list[Part]:
    """Predicted times of all launches of a kernel, in one configuration."""
    entries = {
        key.form: entry for key, entry in report.items()
        if key.group == _group(launches[0]) and key.config == config.astuple()
        if key.triton == version
    }  # fmt: skip
    if not entries:
        raise ValueError(
            f"Triton {version} did not compile {launches[0].name} in {config.astuple()}: "
            f"run python -m benchmarks.compile_report --update"
        )
    S = 2 * case.n_points
    rows, trips = case.batch * S, ()
    programs = -(-rows // config.rows)
    name = f"{launches[0].name.removesuffix('_kernel')} {' '.join(map(str, config.astuple()))}"
    if launches[0].name.startswith("attention_"):
        programs = case.batch * case.n_head * -(-S // config.rows)
        trips = attention_trips(launches[0].name, S, config)
    elif not launches[0].name.startswith("row_"):
        programs, name = launches[0].grid[0], launches[0].name.removesuffix("_kernel")
    times = {
        form: predicted_time.seconds(entry, programs, H100, trips)
        for form, entry in entries.items()
    }
    return [Part(name, times.get(form_of(launch), max(times.values()))) for launch in launches]


def attention_trips(kernel: str, seq_len: int, config: Config) -> tuple[float, ...]:
    """Mean passes through the loops of an attention kernel: tiles that the causal mask leaves."""
    starts = range(0, seq_len, config.rows)
    keys = [-(-min(first + config.rows, seq_len) // config.columns) for first in starts]
    queries = [-(-(seq_len - first) // config.columns) for first in starts]
    loops = (keys,) if kernel == "attention_forward_kernel" else (queries, keys)
    return tuple(sum(trips) / len(trips) for trips in loops)


def torch_parts(ops: list[Op], kernels: list[Part]) -> Iterator[Part]:
    """Predicted times of PyTorch's ops; its attention takes as long as that among ``kernels``."""
    attention = {part.name.split(" ")[0]: part.seconds for part in kernels}
    for op in ops:
        if "scaled_dot_product" in op.name:
            way = "backward" if "backward" in op.name else "forward"
            yield Part("attention", attention[f"attention_{way}"])
        else:
            name = "product" if is_product(op) else "other op"
            yield Part(name, op_seconds(op, H100))


def op_seconds(op: Op, gpu: Gpu) -> float:
    """How long one of PyTorch's ops takes, in a CUDA graph."""
    rate = gpu.flops * op.inner / (op.inner + HALF_RATE) if op.flops else 1.0
    bandwidth = gpu.l2_bandwidth if op.bytes < L2_SIZE / 2 else gpu.bandwidth
    return max(GRAPH_START, op.flops / rate, op.bytes / bandwidth)


def _run(case: Case) -> None:
    """Host code of the loop's forward and backward, with what it would choose on an H100."""
    S, D = 2 * case.n_points, case.n_embd
    architecture = mock.patch.object(tuning, "architecture", return_value=H100.arch)
    with architecture, torch.device("meta"):
        embeddings, targets = torch.zeros(case.batch, S, D), torch.zeros(case.batch, S // 2, 1)
        positions, weights = torch.zeros(S, D), weights_of(1, D)
        read_out = [torch.zeros(1, D), torch.zeros(1)]
        tensors = (embeddings, positions, None, weights, read_out)
        loop = (case.n_head, case.n_loops, case.window, "add")
        errors, history = forward.loop_forward(
            *tensors, *loop, torch.bfloat16, "triton", True, False, False, targets
        )
        backward.loop_backward(errors, errors, history, *tensors, *loop, "triton")


def plain(case: Case, precision: str = "bf16") -> list[Op]:
    """What plain PyTorch launches for the loop of a training step."""
    S, D = 2 * case.n_points, case.n_embd
    with FakeTensorMode(), CountingOps() as ops:
        embeddings, state = torch.zeros(case.batch, S, D), torch.zeros(case.batch, S, D)
        positions, weights = torch.zeros(S, D), weights_of(1, D)
        for tensor in (embeddings, positions, *weights):
            tensor.requires_grad_()
        ops.ops.clear()
        states = reference.loop(
            embeddings, positions, state, weights, case.n_head, case.n_loops, case.window, "add",
            precision,
        )  # fmt: skip
        states.backward(torch.zeros_like(states))
    return ops.ops


def contenders(case: Case, report: Report) -> dict[str, list[Part]]:
    """Kernels of a training step's loop, of everyone compared."""
    versions = sorted({key.triton for key in report})
    short = ours(case, report, versions[0], SHORT)
    found = {f"ours in tiles of 32 rows, Triton {versions[0]}": short}
    for version in versions:
        found[f"ours, Triton {version}"] = ours(case, report, version, {})
    kernels, ops = found[f"ours, Triton {versions[0]}"], plain(case)
    found["compiled step in a CUDA graph"] = list(torch_parts(compiled(ops), kernels))
    found["eager in a CUDA graph"] = list(torch_parts(ops, kernels))
    return found


def step_seconds(parts: list[Part]) -> float:
    """Predicted time of a training step: its loop, and what surrounds it."""
    return sum(part.seconds for part in parts) + SMALL_LAUNCHES * GRAPH_START


def main() -> int:
    """The command."""
    report = load()
    print(ASSUMPTIONS)
    for name in ("lr", "dt"):
        found = contenders(CASES[name], report)
        steps = [
            (contender, len(parts) + SMALL_LAUNCHES, 1e3 * step_seconds(parts))
            for contender, parts in found.items()
        ]
        headers = (f"{name}: contender", "launches", "predicted ms")
        print("\n" + tabulate(steps, headers=headers, floatfmt=".2f"))
        print("\n" + tabulate(_kernels(found), headers=_KERNEL_HEADERS, floatfmt=".1f"))
    return 0


_KERNEL_HEADERS = ("kernel", "launches", "us each", "us in all")


def _kernels(found: dict[str, list[Part]]) -> list[tuple[str, int, float, float]]:
    """A line for each kernel of each contender."""
    lines = []
    for contender, parts in found.items():
        counts = Counter(part.name for part in parts)
        lines.append((contender, len(parts), None, 1e6 * sum(part.seconds for part in parts)))
        for name, n in counts.items():
            total = 1e6 * sum(part.seconds for part in parts if part.name == name)
            lines.append((f"  {name}", n, total / n, total))
    return lines


if __name__ == "__main__":
    sys.exit(main())
