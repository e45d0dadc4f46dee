"""Compile what a visit launches, on all cores and without a GPU, into ``$TRITON_CACHE_DIR``.

    TRITON_CACHE_DIR=/tmp/tc TRITON_STORE_BINARY_ONLY=1 python -m benchmarks.gpu.compile_cache

Launches are recorded on CPU tensors and compiled by Triton's own ``warmup``, behind a driver that
claims to be the GPU, so that the keys of the cache are those of the real launches. Paths inside the
cache are absolute: unpack it where it was made. Python's minor version, PyTorch, Triton and the
kernels must be the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from looped_fast.kernels.candidates import Config, architecture, candidates
from looped_fast.kernels.launch import Launch, recording, settle_cache_key
from looped_fast.kernels.read_in import read_in
from triton.runtime.jit import MockTensor

from benchmarks.gpu.configurations import EXTRA, configurations
from benchmarks.gpu.fake_driver import pretend
from benchmarks.gpu.visit import Visit, say
from benchmarks.kernel_launches import TILES, Loop, launches_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """Sizes of a loop's tensors; machine code depends on whether 16 divides them."""

    seq_len: int = 82
    width: int = 256
    head_dim: int = 32
    batch: int = 4


Run = tuple[Loop, str, Shape, bool]  # with precision, and True to compile all configurations


def runs_of_measure() -> Iterator[Run]:
    """Runs at the paper's size: training and inference, with loss, read-out and neither."""
    for n_loops in (15, 20):
        yield Loop("add", 1, n_loops, 15, n_supervised=15), "bf16", Shape(), True
    yield Loop("add", 1, 15, 15, n_outputs=0), "bf16", Shape(), True
    yield Loop("add", 1, 20, 1, training=False), "bf16", Shape(), True
    yield Loop("add", 1, 20, 1, training=False), "bf16", Shape(batch=1), False
    yield Loop("add", 1, 20, 15, n_supervised=15), "fp32", Shape(), False
    yield Loop("add", 1, 20, 1, training=False), "fp32", Shape(), False


def runs_of_tests() -> Iterator[Run]:
    """Runs of tests/ops/test_gpu.py: in deterministic mode, so only first candidates."""
    small = Shape(22, 64, 16)
    for precision in ("fp32", "bf16", "fp16"):
        for n_loops, window in ((1, 1), (15, 15), (30, 15)):
            yield Loop("add", 1, n_loops, window, n_outputs=0), precision, Shape(), False
        for n_loops, window in ((6, 4), (3, 2), (2, 2)):
            for n_supervised in (0, window):
                loop = Loop("add", 1, n_loops, window, n_supervised=n_supervised)
                yield loop, precision, small, False
    yield Loop("add", 1, 15, 15, n_outputs=0), "tf32", Shape(), False
    for width, n_heads in ((64, 4), (64, 1), (128, 4), (256, 4), (512, 8)):
        shape = Shape(22, width, width // n_heads)
        yield Loop("add", 1, 3, 2, n_outputs=0), "bf16", shape, False
    for injection in ("mul", "none", "every_block"):
        for recompute in (False, True):
            loop = Loop(injection, 2, 3, 2, recompute=recompute, n_outputs=0)
            yield loop, "bf16", small, False
    yield Loop("mul", 1, 3, 2), "fp32", small._replace(seq_len=10), False
    yield Loop("add", 1, 3, 2, recompute=True), "fp32", small._replace(seq_len=10), False
    yield Loop("add", 1, 6, 4, training=False), "fp32", small, False


RUNS = {
    "measure": runs_of_measure,
    "tests": runs_of_tests,
    "dry run": lambda: (),  # only the read-in
}
KINDS = ("measure", "tests")


def configs_of(
    launch: Launch, precision: str, shape: Shape, every: bool, arch: str
) -> list[Config]:
    """Configurations to compile a launch with."""
    if launch.name not in EXTRA:  # its configuration is fixed
        return [launch.config]
    width = launch.constexprs.get("HEAD_DIM", shape.width)
    if every:
        return list(configurations(launch.name, arch, width, precision))
    return [candidates(launch.name, arch, width, precision)[0]]


@functools.cache
def jobs_of(kind: str, arch: str) -> list[tuple[Launch, Config]]:
    """Launches to compile, once each; the same list in every process."""
    found: dict[Any, tuple[Launch, Config]] = {}

    def add(launch: Launch, config: Config) -> None:
        constexprs = {k: v for k, v in launch.constexprs.items() if k not in TILES}
        key = (
            launch.name, config, str(sorted(constexprs.items(), key=str)),
            str(sorted(launch.types.items())), launch.aligned,
        )  # fmt: skip
        found.setdefault(key, (launch, config))

    for loop, precision, shape, every in RUNS[kind]():
        sizes = (shape.batch, shape.seq_len, shape.width, shape.head_dim)
        for launch in itertools.chain(*launches_of(loop, precision, *sizes)):
            for config in configs_of(launch, precision, shape, every, arch):
                add(launch, config)
    for width in (64, 256):
        with recording(execute=False) as launches:
            read_in(torch.empty(1, 5, 20), torch.empty(1, 5), torch.empty(width, 20),
                    torch.empty(width))  # fmt: skip
        for launch in launches:
            add(launch, launch.config)
    return list(found.values())


def compile_launch(launch: Launch, config: Config) -> None:
    """Compile a launch into the cache."""
    constexprs = launch.constexprs | config.tiles(launch.kernel.arg_names)
    arguments: dict[str, Any] = {}
    for name in launch.kernel.arg_names:
        if name in constexprs:
            arguments[name] = constexprs[name]
        elif launch.types[name].startswith("*"):
            arguments[name] = MockTensor(DTYPES[launch.types[name][1:]])
            if name not in launch.aligned:
                arguments[name].data_ptr = lambda: 4
        else:
            arguments[name] = 16 if name in launch.aligned else 17
    settle_cache_key(launch.kernel)
    launch.kernel.warmup(
        **arguments, grid=(1,), num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def _compile(job: tuple[str, str, int]) -> tuple[float, str]:
    """Seconds, and the error if any: a configuration may not fit."""
    kind, arch, index = job
    launch, config = jobs_of(kind, arch)[index]
    start = time.monotonic()
    try:
        compile_launch(launch, config)
    except Exception as error:
        line = str(error).splitlines()[0][:120]
        return 0, f"{launch.name} {config.astuple()}: {type(error).__name__}: {line}"
    return time.monotonic() - start, ""


def fill(kind: str, arch: str) -> dict[str, Any]:
    """Compile the launches of ``kind``, one of ``RUNS``, in a process for each core."""
    start, cores = time.monotonic(), len(os.sched_getaffinity(0))
    pretend(arch)
    jobs = [(kind, arch, i) for i in range(len(jobs_of(kind, arch)))]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(cores, len(jobs)), pretend, (arch,)) as pool:
        done = list(pool.imap_unordered(_compile, jobs))
    failed = [error for _, error in done if error]
    say(f"{kind}: {len(jobs)} kernels for {arch}, {sum(s for s, _ in done):.0f} s of compiling in "
        f"{time.monotonic() - start:.0f} s on {cores} cores")  # fmt: skip
    for error in failed:
        say(error)
    return {"kernels": len(jobs), "failed": failed}


def run(visit: Visit) -> None:
    """Fill the cache for this GPU; for sm_90 in a dry run."""
    arch = "sm_90" if visit.dry else architecture(visit.device)
    for kind in ("dry run",) if visit.dry else KINDS:
        visit.save("compile", **{kind: fill(kind, arch)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90", help="sm_90 by default")
    args = parser.parse_args()
    for kind in KINDS:
        fill(kind, args.arch)


if __name__ == "__main__":
    main()
