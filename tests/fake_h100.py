"""Compiled kernels without a GPU, behind a driver that claims to be an H100.

    TRITON_INTERPRET=0 python tests/fake_h100.py     # prints what happens, as JSON

Host code runs on CPU tensors, and launches do nothing. All kernels but one are compiled by a
stand-in.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from looped_fast.kernels import (
    ahead,
    attention,
    fold,
    read_in,
    row_backward,
    row_forward,
    trial,
    tuning,
)  # fmt: skip
from looped_fast.kernels.candidates import Config, source_hash
from looped_fast.kernels.launch import Call, intercepting

from benchmarks import kernel_launches
from benchmarks.gpu.fake_driver import FakeDriver, target_of
from benchmarks.kernel_launches import Loop

N_CORES = 4
OPTIONS = (Config(16, 16, 16), Config(32, 16, 16), Config(16, 32, 32))
CHOSEN = OPTIONS[1]


class Compiler:
    """Lists kernels as they compile and launch, and how many compile at a time."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.running = self.most_at_a_time = 0
        self.fails = ""  # name of a kernel that does not compile
        self.lock = threading.Lock()

    def compile(self, src, target=None, options=None, _env_vars=None) -> SimpleNamespace:
        with self.lock:
            self.running += 1
            self.most_at_a_time = max(self.running, self.most_at_a_time)
        time.sleep(0.02)
        if src.fn.__name__ == self.fails:
            raise RuntimeError(f"{self.fails} can't be compiled")
        absent = sum(value is None for value in src.constants.values())
        tiles = [src.constants.get((src.fn.arg_names.index("ROWS"),)), options["num_warps"]]
        name = f"{src.fn.__name__} {tiles}, {absent} absent"
        with self.lock:
            self.running -= 1
            self.events.append(("compile", name))
        return SimpleNamespace(
            src=src, metadata=None, function=None, packed_metadata=None,
            launch_metadata=lambda *args: None,
            run=lambda *args: self.events.append(("launch", name)),
        )  # fmt: skip


def use_loop() -> None:
    """Run forward and backward of a loop, as the ops do."""
    unrecorded = contextlib.nullcontext([])
    with mock.patch.object(kernel_launches, "recording", return_value=unrecorded):
        kernel_launches.launches_of(Loop("add", 1, 5, 2), "bf16", 2, 10, 64, 16)


def use_read_in() -> None:
    read_in.read_in(torch.zeros(1, 5, 3), torch.zeros(1, 5), torch.zeros(64, 3), torch.zeros(64))


def use_attention() -> None:
    qkv, out = torch.zeros(1, 10, 192).bfloat16(), torch.zeros(1, 10, 64).bfloat16()
    attention.backward(qkv, out, torch.zeros(1, 4, 10), out, qkv, 4, True)


KERNELS = (
    fold.fold_kernel, row_forward.row_forward_kernel, attention.attention_forward_kernel,
    row_backward.row_backward_kernel, attention.attention_backward_kernel, read_in.read_in_kernel,
)  # fmt: skip


def ask_triton(kernels: Sequence[Any]) -> None:
    for kernel in kernels:
        _ = kernel.cache_key


def keys_after(*uses: Callable[[], Any]) -> dict[str, str]:
    """Return the kernels' cache keys after ``uses`` ran in order."""
    for use in uses:
        use()
    return {kernel.__name__: kernel.cache_key for kernel in KERNELS}


def first_use(compiler: Compiler) -> dict[str, Any]:
    """Compile a loop's kernels ahead and run it, twice."""

    def fastest(options: Sequence[Config], run: Callable[[Config], None], precision: str) -> Config:
        compiler.events.append(("choose", trial._only_call(run, options[0]).kernel.__name__))
        return CHOSEN

    def happens(what: Callable[[], Any]) -> list[tuple[str, str]]:
        compiler.events.clear()
        what()
        return list(compiler.events)

    compile_ahead = functools.partial(ahead.compile_ahead, "key", torch.device("cpu"), use_loop)
    cuda = {
        "current_device": lambda: 0, "device": lambda index: contextlib.nullcontext(),
        "get_device_name": lambda index: "Imaginary 9000",
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    choice = {
        "_may_time": lambda device: True, "architecture": lambda device: "sm_90",
        "candidates": lambda *args: OPTIONS,
    }  # fmt: skip
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(tuning, **choice),
        mock.patch.multiple(trial, fastest=fastest),
        mock.patch.multiple(ahead, _can_compile=lambda device: True),
    ):
        return {
            "ahead": happens(compile_ahead),
            "run": happens(use_loop),
            "ahead again": happens(compile_ahead),
            "most at a time": compiler.most_at_a_time,
        }


def failure(compiler: Compiler) -> str:
    """Return the error of launching a kernel whose compilation failed before."""
    compiler.fails = "read_in_kernel"
    with mock.patch.multiple(ahead, _can_compile=lambda device: True):
        ahead.compile_ahead("key", torch.device("cpu"), use_read_in)
    try:
        use_read_in()
    except RuntimeError as error:
        return str(error)
    return ""


def compile_for_real() -> list[int]:
    """Sizes of machine code that threads compiled, in bytes."""
    calls: list[Call] = []
    with intercepting(lambda call: calls.append(call) is not None):
        use_read_in()
    with ahead.compiling_together():
        calls[0].compile()
    return [
        len(kernel.asm["cubin"]) for kernel in read_in.read_in_kernel.device_caches[0][0].values()
    ]


def scenario(name: str) -> Any:
    """Run a scenario in a fresh process; all but the last with the stand-in compiler."""
    driver = FakeDriver(target_of("sm_90"))
    driver.launcher_cls = lambda source, metadata: None  # launches do nothing
    triton.runtime.driver.set_active(driver)
    os.sched_getaffinity = lambda pid: set(range(N_CORES))
    compiler = Compiler()
    if name != "a real kernel":
        triton.compiler.compile = compiler.compile
    hash_one = functools.partial(source_hash, row_backward.row_backward_kernel)
    scenarios = {
        "Triton's keys": lambda: keys_after(functools.partial(ask_triton, KERNELS)),
        "Triton's keys, reversed": lambda: keys_after(functools.partial(ask_triton, KERNELS[::-1])),
        "keys, loop first": lambda: keys_after(use_loop, use_read_in, use_attention),
        "keys, loop last": lambda: keys_after(use_read_in, use_attention, use_loop),
        "keys, hash first": lambda: keys_after(hash_one, use_read_in, use_loop),
        "first use": lambda: first_use(compiler),
        "failure": lambda: failure(compiler),
        "a real kernel": compile_for_real,
    }
    return scenarios[name]()


NAMES = (
    "Triton's keys", "Triton's keys, reversed", "keys, loop first", "keys, loop last",
    "keys, hash first", "first use", "failure", "a real kernel",
)  # fmt: skip

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(dict(zip(NAMES, pool.map(scenario, NAMES, chunksize=1), strict=True))))
