"""Predict times on an absent GPU: ``python -m benchmarks.roofline``.

Covers training steps at the paper's size, and inference with one prompt.

**A prediction, not a measurement.** Our kernels are predicted from the compile report, by
``predicted_time``; PyTorch's ops from their shapes, see ``ASSUMPTIONS``.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from looped_fast.kernels import backward, few_rows, forward, tuning
from looped_fast.kernels.candidates import Config
from looped_fast.kernels.launch import Launch, recording
from tabulate import tabulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import predicted_time
from benchmarks.cases import CASES, Case
from benchmarks.compile_store import Group, Report, candidates, load
from benchmarks.kernel_launches import form_of, weights_of
from benchmarks.predicted_time import GRAPH_START, H100, Gpu
from benchmarks.work import CountingOps, Op, compiled, is_product
from looped_fast.ops import reference
from looped_fast.ops.call import LoopSettings

# The best tiles without wgmma, which needs 64 rows or more, to compare ours with.
SHORT = {
    "row_forward_kernel": Config(32, 32, 32, 4),
    "row_backward_kernel": Config(32, 64, 64, 8),
}
HALF_RATE = 320  # a product that sums so many terms reaches half of the matrix rate
L2_SIZE = 50e6  # bytes
STEP_BYTES = 32  # per element of the residual in a loop step: x and e in fp32, 12 values in bf16
# Read-in, loss, clipping and optimizer of every contender, and the read-out of PyTorch's, which
# adds little; our kernels include it.
SMALL_LAUNCHES = {"training": 100, "inference": 5}
ASSUMPTIONS = f"""Prediction for one {H100.name}, bf16, from counted work and these assumptions:
- our kernels: benchmarks/predicted_time.py, in the candidates that take least at the case's size;
  from L2 alone where what a loop step reads and writes fits into half of it;
  a form that was not compiled counts as the one that does most;
- PyTorch's products that sum over K terms reach K / (K + {HALF_RATE}) of
  {H100.flops / 1e12:.0f} TFLOP/s;
- PyTorch's other ops move their tensors at the speed of DRAM, {H100.bandwidth / 1e12:.1f} TB/s, or
  of the L2 cache, {H100.l2_bandwidth / 1e12:.1f}, where all of them fit into half of it;
- PyTorch's attention takes as long as ours, which favours PyTorch;
- a compiled step has one kernel between two products;
- a kernel of a CUDA graph takes {1e6 * GRAPH_START:.1f} us or more, and for everything outside the
  loop {SMALL_LAUNCHES["training"]} of these are added to a training step, \
{SMALL_LAUNCHES["inference"]} to inference."""


class Part(NamedTuple):
    """A kernel of a step."""

    name: str
    seconds: float


def ours(case: Case, report: Report, version: str, configs: dict[str, Config]) -> list[Part]:
    """What the Triton backend launches for the loop of a training step, or of inference.

    Args:
        case: the size.
        report: the compile report.
        version: version of Triton whose entries count.
        configs: kernel -> configuration, instead of the one predicted to be fastest.
    """
    tensors = _tensors(case)
    with recording(execute=False) as launches, CountingOps() as ops:
        _run(case, *tensors)
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
    trips: tuple[float, ...] = ()
    name = launches[0].name.removesuffix("_kernel")
    programs = None  # the same for each launch
    if name.startswith("row_"):
        programs = -(-case.batch * S // config.rows)
    elif name.startswith("attention_"):
        programs = case.batch * case.n_head * -(-S // config.rows)
        trips = attention_trips(launches[0].name, S, config)
    if programs:
        name += " " + " ".join(map(str, config.astuple()))

    gpu = H100
    if case.batch * S * case.n_embd * STEP_BYTES < L2_SIZE / 2:  # nothing comes from DRAM
        gpu = replace(H100, bandwidth=H100.l2_bandwidth)

    def seconds(launch: Launch) -> float:
        form, n = form_of(launch), programs or math.prod(launch.grid)
        alike = [entries[form]] if form in entries else entries.values()
        return max(predicted_time.seconds(entry, n, gpu, trips) for entry in alike)

    return [Part(name, seconds(launch)) for launch in launches]


def attention_trips(kernel: str, seq_len: int, config: Config) -> tuple[float, ...]:
    """Mean passes through the loops of an attention kernel: tiles that the causal mask leaves."""
    starts = range(0, seq_len, config.rows)
    keys = [-(-min(first + config.rows, seq_len) // config.columns) for first in starts]
    queries = [-(-(seq_len - first) // config.columns) for first in starts]
    loops = (keys,) if kernel == "attention_forward_kernel" else (queries, keys)
    return tuple(sum(trips) / len(trips) for trips in loops)


def torch_parts(ops: list[Op], kernels: list[Part]) -> Iterator[Part]:
    """Predicted times of PyTorch's ops, with the attention of ``kernels``."""
    attention = {part.name.split(" ")[0]: part.seconds for part in kernels}
    for op in ops:
        if "scaled_dot_product" in op.name:
            direction = "backward" if "backward" in op.name else "forward"
            yield Part("attention", attention[f"attention_{direction}"])
        else:
            name = "product" if is_product(op) else "other op"
            yield Part(name, op_seconds(op, H100))


def op_seconds(op: Op, gpu: Gpu) -> float:
    """Predicted time of one of PyTorch's ops, in a CUDA graph."""
    rate = gpu.flops * op.inner / (op.inner + HALF_RATE) if op.flops else 1.0
    bandwidth = gpu.l2_bandwidth if op.bytes < L2_SIZE / 2 else gpu.bandwidth
    return max(GRAPH_START, op.flops / rate, op.bytes / bandwidth)


def _tensors(case: Case) -> tuple[list[Any], Tensor]:
    """Meta tensors of ``loop_forward``, up to the read-out, and targets."""
    S, D = 2 * case.n_points, case.n_embd
    with torch.device("meta"):
        embeddings, targets = torch.empty(case.batch, S, D), torch.empty(case.batch, S // 2, 1)
        read_out = [torch.empty(1, D), torch.empty(1)]
        return [embeddings, torch.empty(S, D), None, weights_of(1, D), read_out], targets


def _run(case: Case, tensors: list[Any], targets: Tensor) -> None:
    """Run the host code of the loop's forward and backward, with its choices on an H100."""
    training = _mode(case) == "training"
    settings = _settings(case, "bf16")
    with mock.patch.object(tuning, "architecture", return_value=H100.arch):
        result, saved = forward.loop_forward(
            *tensors, settings, training, False, False, targets if training else None
        )
        if training:
            wanted = [True] * (3 + len(tensors[3]) + len(tensors[4]))
            backward.loop_backward(result, saved, *tensors, settings, wanted)


def _settings(case: Case, precision: str) -> LoopSettings:
    window = case.window if _mode(case) == "training" else 1
    return LoopSettings(case.n_head, case.n_loops, window, precision=precision, attention="triton")


def _mode(case: Case) -> str:
    """Mode that is predicted of a case: training if it has that."""
    return case.modes[0]


def plain(case: Case, precision: str = "bf16") -> list[Op]:
    """Ops that plain PyTorch launches for the loop of a training step, or of inference."""
    S, D, training = 2 * case.n_points, case.n_embd, _mode(case) == "training"
    with FakeTensorMode(), CountingOps() as ops:
        embeddings, state = torch.zeros(case.batch, S, D), torch.zeros(case.batch, S, D)
        positions, weights = torch.zeros(S, D), weights_of(1, D)
        for tensor in (embeddings, positions, *weights):
            tensor.requires_grad_(training)
        ops.ops.clear()
        settings = _settings(case, precision)
        states = reference.loop(embeddings, positions, state, weights, settings)
        if training:
            states.backward(torch.zeros_like(states))
    return ops.ops


def contenders(case: Case, report: Report) -> dict[str, list[Part]]:
    """Kernels of each contender in the loop of a training step, or of inference."""
    versions = sorted({key.triton for key in report})
    if _mode(case) == "training":
        worse, variant = ours(case, report, versions[0], SHORT), "in tiles of 32 rows"
    else:
        with mock.patch.object(few_rows, "MAX_ROWS", 0):
            worse, variant = ours(case, report, versions[0], {}), "as for many rows"
    found = {f"ours {variant}, Triton {versions[0]}": worse}
    for version in versions:
        found[f"ours, Triton {version}"] = ours(case, report, version, {})
    kernels, ops = found[f"ours, Triton {versions[0]}"], plain(case)
    found["compiled step in a CUDA graph"] = list(torch_parts(compiled(ops), kernels))
    found["eager in a CUDA graph"] = list(torch_parts(ops, kernels))
    return found


def total_seconds(case: Case, parts: list[Part]) -> float:
    """Predicted time of a training step or a call: its loop, and what surrounds it."""
    return sum(part.seconds for part in parts) + SMALL_LAUNCHES[_mode(case)] * GRAPH_START


def main() -> int:
    """Print the predictions."""
    report = load()
    print(ASSUMPTIONS)
    for name in ("lr", "dt", "lr_b1", "dt_b1"):
        case = CASES[name]
        found = contenders(case, report)
        steps = [
            (
                contender,
                len(parts) + SMALL_LAUNCHES[_mode(case)],
                1e3 * total_seconds(case, parts),
            )
            for contender, parts in found.items()
        ]
        headers = (f"{name}, {_mode(case)}: contender", "launches", "predicted ms")
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
