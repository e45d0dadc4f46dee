"""Check that the kernels run and are right: the loop at paper size against float64."""

from __future__ import annotations

import dataclasses
import os
import time

import torch
import triton

from benchmarks.correctness import WrongResult
from benchmarks.gpu.accuracy import trm_block, worst_error
from benchmarks.gpu.configurations import forced
from benchmarks.gpu.visit import Visit, say


def run(visit: Visit) -> None:
    """Raise WrongResult if an error is over the limit; print what Triton had to compile."""
    compilations = {True: 0, False: 0}

    def count(*, cache_hit: bool, **_: object) -> None:
        compilations[cache_hit] += 1

    triton.knobs.compilation.listener = count
    case = visit.case("lr")
    if not visit.dry:
        case = dataclasses.replace(case, batch=4, n_loops=15, window=15)
    device = visit.device if visit.dry else torch.cuda.get_device_name()
    say(f"PyTorch {torch.__version__}, Triton {triton.__version__}, {device}, "
        f"cache {os.environ.get('TRITON_CACHE_DIR', '~/.triton/cache')}")  # fmt: skip
    start = time.monotonic()
    with forced({}):
        errors = {
            "GPT-2": worst_error(case, visit.device),
            "TRM": worst_error(case, visit.device, "bf16", trm_block(case)),
        }
    seconds = time.monotonic() - start
    for name, error in errors.items():
        say(f"the loop, forward and backward, in bf16 against float64, {name}'s block: worst error "
            f"{error.share:.2f} of the limit ({error.tensor})")  # fmt: skip
    say(f"{seconds:.1f} s; kernels compiled {compilations[False]}, "
        f"from the cache {compilations[True]}")  # fmt: skip
    visit.save(
        "smoke", worst_error={name: error._asdict() for name, error in errors.items()}, s=seconds,
        compiled=compilations[False], from_cache=compilations[True],
    )  # fmt: skip
    for name, error in errors.items():
        if not error.share <= 1:
            raise WrongResult(
                f"{name}'s block: {error.tensor}: the error is {error.share:.2f} times the limit"
            )
