"""Where the triton backend runs, why it can't elsewhere, and the models that it speeds up."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import foreign_models as foreign
import pytest
import torch
from conftest import CALL, changed, needs_triton, prompt, relative_error, small_model
from foreign_models import Settings

import looped_fast
from looped_fast import LoopedTransformer, explain_backend
from looped_fast.ops import backends, triton_backend

ROOT = Path(__file__).parents[2]
WIDE = {"n_embd": 64, "n_head": 4}  # the smallest model that the kernels take

WITHOUT_TRITON = """
    import sys
    sys.modules["triton"] = None  # what "import triton" finds where it is not installed
    import torch
    from looped_fast import LoopedTransformer, ModelConfig, explain_backend
    config = ModelConfig(n_dims=3, n_positions=4, n_embd=64, n_head=4, n_loops=2, window=1)
    model = LoopedTransformer(config)
    print(explain_backend(model, 2, 4))
    model(torch.randn(2, 4, 3), torch.randn(2, 4)).sum().backward()
    model.backend = "triton"
    try:
        model(torch.randn(2, 4, 3), torch.randn(2, 4))
    except ValueError as error:
        print("ValueError:", error)
"""


def test_without_triton_the_package_works_and_says_what_is_missing():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_TRITON)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not triton: Triton is not installed (pip install" in done.stdout
    assert "ValueError: backend 'triton' can't run this: Triton is not installed" in done.stdout


@needs_triton
def test_a_cpu_tensor_outside_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    model = small_model(**WIDE)
    model.backend = "triton"
    with pytest.raises(ValueError, match=r"tensors are on the CPU; move them to a GPU"):
        model(*prompt())


@needs_triton
def test_an_old_triton_is_named(monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.2.0")
    uncached = triton_backend.load_error.__wrapped__
    assert uncached() == "Triton is 3.2.0; 3.6 or later is needed"


@needs_triton
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "mps"}, "tensors are on mps"),
        ({"dtype": torch.float64}, "it takes float32 tensors, not torch.float64"),
        ({"n_embd": 96, "n_heads": 3}, r"D = 96 is not one of \(64, 128, 256, 512\)"),
        ({"n_heads": 2}, r"head_dim = 128 is not one of \(16, 32, 64\)"),
        ({"batch": 2**15}, "2751463424 hidden activations .* use smaller batches"),
    ],
)
def test_what_the_kernels_can_not_do_is_said(changes, reason):
    assert triton_backend.unsupported(CALL) is None
    problem = changed(CALL, **changes)
    with pytest.raises(ValueError, match=f"backend 'triton' can't run this: {reason}"):
        backends.select(changed(problem, backend="triton"))


@needs_triton
@pytest.mark.parametrize(
    ("capability", "precision", "runs"),
    [
        ((8, 0), "fp32", True),
        ((8, 9), "bf16", True),
        ((8, 9), "fp32", False),
        ((9, 0), "fp32", True),
        ((12, 0), "fp32", False),
    ],
)
def test_the_widest_fp32_needs_a_gpu_with_much_shared_memory(
    capability, precision, runs, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    problem = changed(CALL, device="cuda", precision=precision, n_embd=512, n_heads=8)
    reason = triton_backend.unsupported(problem)
    assert reason is None if runs else "fp32 at D = 512 does not fit in the 99 KiB" in reason


@needs_triton
def test_interpreted_kernels_run_only_when_asked_for():
    explanation = backends.select(CALL)
    assert explanation.chosen != "triton"
    assert explanation.reasons["triton"] == "interpreted kernels run only when asked for"
    assert backends.select(changed(CALL, backend="triton")).chosen == "triton"


def predictions_and_gradients(model, args):
    model.zero_grad()
    output = model(*args)
    outputs = output if isinstance(output, list | tuple) else [output]
    sum((o - 0.5).square().mean() for o in outputs).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.stack([o.detach().double() for o in outputs]), gradients.double()


def own_model():
    return small_model(n_dims=5, **WIDE)


PROMPT = (torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1)), torch.ones(2, 5))
ACCELERATED = {
    "own": (own_model, PROMPT),
    "official looped": (lambda: foreign.Looped(settings=Settings(D=64)), (*PROMPT, 1, 3)),
    "official standard": (
        lambda: foreign.Standard(settings=Settings(D=64, n_layer=2)), (*PROMPT, True),
    ),
    "official tied": (lambda: foreign.Tied(settings=Settings(D=64)), (*PROMPT, False)),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("make", "args"), ACCELERATED.values(), ids=ACCELERATED.keys())
def test_accelerated_models_are_as_accurate_as_plain_ones(make, args):
    model = make()
    plain = predictions_and_gradients(model, args)
    looped_fast.accelerate(model, backend="triton", precision="fp32")
    fast = predictions_and_gradients(model, args)
    looped_fast.restore(model)
    exact = predictions_and_gradients(
        model.double(), tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
    )
    for factor, name, f, p, e in zip(
        (2, 3), ("output", "gradient"), fast, plain, exact, strict=True
    ):
        assert relative_error(f, e) <= factor * relative_error(p, e) + 4e-7, name


@needs_triton
def test_explain_backend_tells_of_the_triton_backend():
    model = LoopedTransformer(looped_fast.ModelConfig(**WIDE), backend="triton")
    assert str(explain_backend(model, 4, 9)).startswith("backend: triton\n")


def test_a_model_exports_with_any_batch(monkeypatch):
    """The limit of the kernels' indices does not apply to a model on the CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = torch.export.Dim("batch")
    model, args = small_model(**WIDE), prompt(B=3)
    exported = torch.export.export(model, args, dynamic_shapes=({0: batch}, {0: batch}))
    larger = prompt(B=5)
    torch.testing.assert_close(exported.module()(*larger), model(*larger))
