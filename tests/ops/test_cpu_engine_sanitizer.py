"""The engine under AddressSanitizer: nothing is read or written outside of a buffer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import needs_engine
from test_cpu_engine_robustness import run_python

pytestmark = [
    needs_engine,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC's AddressSanitizer"),
]

STEPS = """
    import torch
    from block_cases import block_inputs, rotary_tables
    from conftest import cast, leaves, loop_inputs, require_grad
    from looped_fast import ops
    from looped_fast.ops import TRM
    from looped_fast.ops import cpu_engine, op
    from looped_fast.ops.call import LoopSettings, LoopTensors

    shapes = [  # with tails of every kind: odd S, D and 4 D that end inside a panel, S > 256
        dict(B=1, S=1, D=32, n_heads=4, window=1, injection="none"),
        dict(B=3, S=23, D=64, n_heads=4, window=2, injection="add"),
        dict(
            B=1, S=37, D=96, n_heads=4, window=1, injection="mul", recompute=True, n_outputs=1
        ),
        dict(B=5, S=7, D=32, n_heads=1, window=2, injection="every_block", n_layer=2),
        dict(B=1, S=263, D=32, n_heads=2, window=2, injection="add"),
        dict(B=33, S=5, D=32, n_heads=2, window=2, injection="add", n_outputs=3),
    ]
    assert "sanitized" in str(cpu_engine.file())
    precisions = [p for p in ("fp32", "bf16") if cpu_engine.unsupported_precision(p) is None]
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        for precision in precisions:
            for shape in shapes:
                names = ("B", "S", "D", "n_layer", "n_outputs")
                made_of = {k: v for k, v in shape.items() if k in names}
                settings = {k: v for k, v in shape.items() if k not in made_of}
                inputs = require_grad(loop_inputs(**made_of, dtype=torch.float32))
                outputs = ops.loop(
                    **inputs, **settings, n_loops=2, precision=precision, backend="cpu"
                )
                outputs.square().sum().backward()
                for name, leaf in leaves(inputs).items():
                    assert leaf.grad is None or leaf.grad.isfinite().all(), (name, shape)
            for B, S, D, n_heads, hidden, mask, injection in [
                (1, 1, 32, 4, 32, "full", "add"), (33, 5, 32, 1, 96, "causal", "add"),
                (3, 37, 96, 3, 160, "full", "every_block"), (1, 263, 64, 4, 64, "full", "mul"),
            ]:  # fmt: skip
                block = TRM._replace(mlp_hidden=hidden, mask=mask)
                inputs = require_grad(cast(block_inputs(block, B, S, D, 2), torch.float32))
                for recompute in (False, True):
                    states = ops.loop(
                        **inputs, positions=rotary_tables(S, D // n_heads, torch.float32),
                        block=block, n_heads=n_heads, n_loops=2, window=2, injection=injection,
                        recompute=recompute, precision=precision, backend="cpu",
                    )
                    states.square().sum().backward()
                assert all(leaf.grad.isfinite().all() for leaf in leaves(inputs).values())
            for B, n_shared, m in [(1, 0, 3), (3, 37, 45), (1, 260, 33), (20, 5, 2)]:
                inputs = loop_inputs(B=B, S=n_shared + m, D=96, dtype=torch.float32, n_outputs=2)
                seen = torch.randint(0, n_shared + 1, (m,))
                call = dict(n_heads=4, n_loops=3, window=1, precision=precision, backend="cpu")
                assert ops.loop(**inputs, seen=seen, **call).isfinite().all()
                for queries in (seen, None):
                    tensors = LoopTensors(**inputs, seen=queries)
                    predictions, _ = op.run_until(tensors, LoopSettings(**call), 0.5)
                    assert predictions.isfinite().all()
    print(*precisions)
"""


def library(name):
    """The path of one of GCC's libraries, or its name if it is not there."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Arguments of ``run_python`` for an engine that is built with AddressSanitizer."""
    folder = tmp_path_factory.mktemp("sanitized")
    # libasan looks for functions of libstdc++ when it starts, which is before Python loads that.
    runtime = [library("libasan.so"), library("libstdc++.so")]
    if not Path(runtime[0]).is_absolute():
        pytest.skip("GCC is here without its AddressSanitizer (libasan)")
    # -O1 after the engine's -O3, and checks by calls, compile in a sixth of the time.
    flags = "-fsanitize=address --param asan-instrumentation-with-call-threshold=0"
    compiler = folder / "g++"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" -O1 -fno-omit-frame-pointer {flags}\n')
    compiler.chmod(0o755)
    code = """
        from looped_fast.csrc import build
        from looped_fast.ops import engine_file
        build.compile_engine(engine_file.folder() / build.file_name())
    """
    run_python(code, CXX=str(compiler), XDG_CACHE_HOME=str(folder))
    (built,) = folder.glob("looped_fast/engines/*.so")
    assert b"__asan_store" in built.read_bytes(), "the flags did not reach the compiler"
    return {
        "XDG_CACHE_HOME": str(folder),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # CPython itself leaks
    }


@pytest.mark.parametrize("environment", [{}, {"ATEN_CPU_CAPABILITY": "avx2"}])
def test_training_steps_stay_inside_their_buffers(sanitized, environment):
    assert "fp32" in run_python(STEPS, **sanitized, **environment)
