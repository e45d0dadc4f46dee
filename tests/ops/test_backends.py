from __future__ import annotations

import pytest
import torch
from conftest import CALL, changed, small_model

from looped_fast import explain_backend
from looped_fast.ops import backend_times, backends
from looped_fast.ops.call import Call, LoopSettings
from looped_fast.ops.selection import Selection


@pytest.fixture
def three_backends(monkeypatch):
    """A fast backend for float32 only, one that never runs, and the reference."""
    table = {
        "triton": lambda call: "no GPU here",
        "cpu": lambda call: None if call.dtype == torch.float32 else "float32 only",
        "reference": lambda call: None,
    }
    monkeypatch.setattr(backends, "UNSUPPORTED", table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_is_always_a_backend(dtype):
    explanation = backends.select(changed(CALL, dtype=dtype))
    others = set(backends.UNSUPPORTED) - {explanation.chosen}
    assert explanation.chosen in backends.UNSUPPORTED
    assert set(explanation.reasons) == others
    assert all(explanation.reasons.values())


def test_the_reference_can_always_be_forced():
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32), ("mps", torch.float16)):
        problem = changed(CALL, device=device, dtype=dtype)
        assert backends.select(changed(problem, backend="reference")).chosen == "reference"


def test_the_first_able_backend_is_chosen(three_backends):
    explanation = backends.select(CALL)
    assert explanation.chosen == "cpu"
    assert explanation.reasons == {"triton": "no GPU here", "reference": "cpu comes first"}


def test_an_unable_backend_is_passed_over(three_backends):
    explanation = backends.select(changed(CALL, dtype=torch.float64))
    assert explanation.chosen == "reference"
    assert explanation.reasons == {"triton": "no GPU here", "cpu": "float32 only"}


def test_a_forced_backend_is_taken_over_an_earlier_one(three_backends):
    explanation = backends.select(changed(CALL, backend="reference"))
    assert explanation.chosen == "reference"
    assert explanation.reasons["cpu"] == "reference was asked for"


def test_forcing_an_unable_backend_says_why(three_backends):
    with pytest.raises(ValueError, match=r"'triton' can't run this: no GPU here.*'auto'"):
        backends.select(changed(CALL, backend="triton"))


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU that every backend but the CPU's can run on."""
    providers = pytest.importorskip("looped_fast.kernels.providers", exc_type=ImportError)
    monkeypatch.setattr(providers, "select", lambda call: Selection("attention", "triton", {}))
    table = {name: lambda call: None for name in ("triton", "compiled", "reference")}
    monkeypatch.setattr(backends, "UNSUPPORTED", table)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "reference"),
        ({"n_embd": 512}, "reference"),
        ({"n_embd": 128}, "triton"),
        ({"precision": "bf16"}, "triton"),
        ({"attention": "triton"}, "triton"),
    ],
    ids=str,
)
def test_wide_fp32_products_on_a_gpu_are_left_to_cublas(a_gpu, changes, chosen):
    explanation = backends.select(changed(CALL, device="cuda", **changes))
    assert explanation.chosen == chosen
    if chosen == "reference":
        assert "predicted slower than cuBLAS in fp32" in explanation.reasons["triton"]
        assert "backend='triton' forces it" in explanation.reasons["triton"]


def test_wide_tf32_products_on_a_gpu_stay_in_triton(a_gpu, monkeypatch):
    monkeypatch.setattr(backend_times, "operand_precision", lambda dtype: "tf32")
    assert backends.select(changed(CALL, device="cuda")).chosen == "triton"


def test_fp32_kernels_can_be_forced(a_gpu):
    call = changed(CALL, device="cuda", backend="triton")
    assert backends.select(call).chosen == "triton"


def test_a_compiled_step_runs_where_it_is_asked_for(a_gpu):
    bf16 = changed(CALL, device="cuda", precision="bf16")
    assert "runs when asked for" in backends.select(bf16).reasons["compiled"]
    assert backends.select(changed(bf16, backend="compiled")).chosen == "compiled"


def test_an_unknown_backend_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown backend 'tritn'; did you mean 'triton'"):
        backends.select(changed(CALL, backend="tritn"))


def test_an_explanation_reads_as_text():
    text = str(Selection("backend", "reference", {"cpu": "float32 only"}))
    assert text == "backend: reference\n  not cpu: float32 only"


def test_explain_backend_describes_the_models_problem(monkeypatch):
    seen = []
    monkeypatch.setattr(
        backends, "UNSUPPORTED", {"reference": lambda call: seen.append(call) or None}
    )
    model = small_model(torch.float64, n_layer=2, injection="mul")
    explanation = explain_backend(model, batch_size=7, n_points=5, precision="bf16")
    assert str(explanation) == "backend: reference"
    expected = Call(
        LoopSettings(n_heads=2, n_loops=4, window=2, injection="mul", precision="bf16"),
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch=7,
        seq_len=10,
        n_embd=16,
        n_layer=2,
    )
    assert seen == [expected]


@pytest.mark.parametrize("settings", [{}, {"precision": "fp32"}])
def test_explain_backend_follows_autocast_unless_told_otherwise(monkeypatch, settings):
    seen = []
    monkeypatch.setattr(
        backends,
        "UNSUPPORTED",
        {"reference": lambda call: seen.append(call.settings.precision) or None},
    )
    with torch.autocast("cpu", torch.bfloat16):
        explain_backend(small_model(), batch_size=2, n_points=5, **settings)
    assert seen == [settings.get("precision", "bf16")]


def test_explain_backend_tells_training_steps_from_inference(monkeypatch):
    seen = []
    monkeypatch.setattr(
        backends, "UNSUPPORTED", {"reference": lambda call: seen.append(call) or None}
    )
    explain_backend(small_model(), 2, 5)  # not replayed on a CPU
    explain_backend(small_model(), 2, 5, replayed_training=True)
    assert [(problem.replayed, problem.training) for problem in seen] == [
        (False, False),
        (True, True),
    ]


def test_explain_backend_respects_a_forced_one():
    model = small_model()
    model.backend = "reference"
    assert explain_backend(model, batch_size=2, n_points=5).chosen == "reference"
