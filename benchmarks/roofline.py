"""Predicts time per training step of the loop on GPUs that are not there: ``python -m
benchmarks.roofline``, some minutes.

**A prediction, not a measurement.** Kernels' work is counted (``work.py``); how fast a GPU does it
is assumed, see ``ASSUMPTIONS``. Both the fused kernels and plain PyTorch are modelled by the same
rule: a kernel takes as long as the slowest of tensor cores, L2 cache and DRAM, and never less than
it takes to start.
"""

from __future__ import annotations

import functools
import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its interpreter counts

import sys
from dataclasses import dataclass, replace
from unittest import mock

import torch
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cases import CASES, Case
from benchmarks.kernel_launches import weights_of
from benchmarks.work import CountingOps, Work, counting_kernels
from looped_fast import reference
from looped_fast.kernels import attention, backward, forward, tuning
from looped_fast.kernels.launch import Launch, recording
from looped_fast.kernels.tuning import Config


@dataclass(frozen=True)
class Gpu:
    """Peak figures of the vendor's data sheet, dense."""

    name: str
    arch: str
    processors: int  # streaming multiprocessors
    flops: float  # bf16 tensor cores
    bandwidth: float  # DRAM, bytes/s


GPUS = (
    Gpu("A100 SXM 80 GB", "sm_80", 108, 312e12, 2.04e12),
    Gpu("H100 SXM", "sm_90", 132, 989e12, 3.35e12),
    Gpu("B200", "sm_100", 148, 2250e12, 8.0e12),
)
REACHED = 0.6  # share of the peak of tensor cores and of DRAM that a good kernel reaches
L2_RATIO = 2.5  # bandwidth of the L2 cache over that of DRAM
GRAPH_START = 1.5e-6  # seconds from one kernel of a CUDA graph to the next
EAGER_START = 5e-6  # seconds for which PyTorch occupies the CPU with one op
ASSUMPTIONS = f"""Prediction, from counted work and these assumptions:
- kernels reach {REACHED:.0%} of the data sheet's tensor-core rate and DRAM bandwidth;
- the L2 cache delivers {L2_RATIO} times the DRAM bandwidth; of our kernels all loads and stores are
  taken to pass it, of PyTorch's ops only distinct memory, which favours PyTorch;
- the multiprocessor with the most programs of a kernel decides when it ends;
- a kernel takes {1e6 * GRAPH_START:.1f} us or more in a CUDA graph, and
  {1e6 * EAGER_START:.0f} us or more where PyTorch launches it;
- configurations are the first candidates for the architecture, bf16; nothing overlaps;
- the loop alone: no read-in, read-out, loss or optimizer."""


def seconds(work: Work, gpu: Gpu, start: float) -> float:
    """How long one kernel takes by the model above."""
    balance = 1.0
    if work.programs:
        busiest = -(-work.programs // gpu.processors)
        balance = busiest * gpu.processors / work.programs
    reached = REACHED * gpu.bandwidth
    times = work.flops / (REACHED * gpu.flops), work.moved / (L2_RATIO * reached)
    return max(start, balance * max(times), work.touched / reached)


def fused(case: Case, arch: str) -> list[Work]:
    """What the Triton backend launches for the loop of a training step, in bf16.

    Grids are those of the real size. What a kernel does is counted at a small one, where the
    interpreter is quick: of attention on one sequence, since it does the same on all; of the rows'
    kernels at two sizes of whole tiles, since part of the memory that they touch, the weights,
    does not grow with rows.
    """
    D, S = case.n_embd, 2 * case.n_points
    with recording(execute=False) as launches, CountingOps() as ops:
        _run(case, arch, case.batch, S, "meta")
    twin, rows = _twin(case, arch), max(config.rows for config in _configs("row", D, arch))
    sequence = attention_work(D, case.n_head, S, twin)
    few, more = row_work(D, rows, twin), row_work(D, 2 * rows, twin)
    works = []
    for launch in launches:
        form, programs = form_of(launch), math.prod(launch.grid)
        if form in sequence:
            work = sequence[form].times(case.batch)
        else:
            growth = more[form].touched - few[form].touched
            growth /= max(1, more[form].programs - few[form].programs)  # 0 where none is by rows
            touched = few[form].touched + growth * (programs - few[form].programs)
            work = replace(few[form].times(programs / few[form].programs), touched=touched)
        works.append(replace(work, programs=programs))
    return works + ops.works


def _configs(kind: str, width: int, arch: str) -> list[Config]:
    ways = ("forward", "backward")
    return [tuning.candidates(f"{kind}_{way}_kernel", arch, width, "bf16")[0] for way in ways]


def _twin(case: Case, arch: str) -> str:
    """The first of GPUS whose programs do the same as on ``arch``, so that it is counted once."""

    def tiles(arch: str) -> list[tuple[int, ...]]:
        attention = _configs("attention", case.n_embd // case.n_head, arch)
        rows = _configs("row", case.n_embd, arch)
        return [(c.rows, c.columns) for c in attention] + [(c.rows,) for c in rows]

    return next((gpu.arch for gpu in GPUS if tiles(gpu.arch) == tiles(arch)), arch)


Form = tuple[str, ...]  # of a launch: kernel and the arguments it has


def form_of(launch: Launch) -> Form:
    """All launches of a form do the same, up to their size."""
    return launch.name, *launch.types


@functools.cache
def attention_work(D: int, n_heads: int, seq_len: int, arch: str) -> dict[Form, Work]:
    """Of the attention kernels on one sequence."""
    qkv = torch.zeros(1, seq_len, 3 * D, dtype=torch.bfloat16)
    out, lse = torch.zeros_like(qkv[..., :D]), torch.zeros(1, n_heads, seq_len)
    with mock.patch.object(tuning, "architecture", return_value=arch), counting_kernels() as found:
        attention.forward(qkv, out, lse, n_heads)
        attention.backward(qkv, out, lse, out, qkv.clone(), n_heads)
    return {form_of(launch): work for launch, work in found}


@functools.cache
def row_work(D: int, n_rows: int, arch: str) -> dict[Form, Work]:
    """Of all other kernels, on so many rows; the window is in two chunks, as a long one is."""
    case = Case(batch=1, n_points=0, n_loops=4, window=3, n_embd=D, n_head=D // 16)
    chunks = mock.patch.object(backward, "steps_per_chunk", return_value=2)
    with chunks, counting_kernels() as found:
        _run(case, arch, n_rows // 16, 16, "cpu")
    return {form_of(launch): work for launch, work in found}


def _run(case: Case, arch: str, batch: int, seq_len: int, device: str) -> None:
    """Host code of the loop's forward and backward, with what it would choose on ``arch``."""
    D = case.n_embd
    with mock.patch.object(tuning, "architecture", return_value=arch), torch.device(device):
        embeddings, state = torch.zeros(2, batch, seq_len, D)
        positions, weights = torch.zeros(seq_len, D), weights_of(1, D)
        loop = (case.n_head, case.n_loops, case.window, "add")
        states, history = forward.loop_forward(
            embeddings, positions, state, weights, *loop, torch.bfloat16, "triton", True, False
        )
        backward.loop_backward(
            states, states, history, embeddings, positions, state, weights, *loop, "triton"
        )


def eager(case: Case, precision: str) -> list[Work]:
    """What plain PyTorch launches for the loop of a training step."""
    S, D = 2 * case.n_points, case.n_embd
    with FakeTensorMode(), CountingOps() as ops:
        embeddings, state = torch.zeros(case.batch, S, D), torch.zeros(case.batch, S, D)
        positions, weights = torch.zeros(S, D), weights_of(1, D)
        for tensor in (embeddings, positions, *weights):
            tensor.requires_grad_()
        ops.works.clear()
        states = reference.loop(
            embeddings, positions, state, weights, case.n_head, case.n_loops, case.window, "add",
            precision,
        )  # fmt: skip
        states.backward(torch.zeros_like(states))
    return ops.works


def main() -> int:
    """The command."""
    rows = []
    for name in ("lr", "dt"):
        case = CASES[name]
        plain = eager(case, "bf16")
        for gpu in GPUS:
            ours = fused(case, gpu.arch)
            t_plain = sum(seconds(work, gpu, EAGER_START) for work in plain)
            t_ours = sum(seconds(work, gpu, GRAPH_START) for work in ours)
            rows.append(
                (name, gpu.name, len(plain), 1e3 * t_plain, len(ours), 1e3 * t_ours,
                 t_plain / t_ours, sum(w.flops for w in ours) / 1e9,
                 sum(w.touched for w in ours) / 1e9, sum(w.moved for w in ours) / 1e9)
            )  # fmt: skip
    headers = (
        "case", "GPU", "launches, PyTorch eager bf16", "predicted ms", "launches, fused",
        "predicted ms", "ratio", "GFLOP", "GB touched", "GB moved",
    )  # fmt: skip
    print(ASSUMPTIONS, "\n")
    print(
        tabulate(
            rows,
            headers=headers,
            floatfmt=("", "", "", ".2f", "", ".2f", ".1f", ".0f", ".2f", ".1f"),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
