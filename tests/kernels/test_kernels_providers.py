"""Providers of attention: which one is selected and why, and the accuracy of each."""

from __future__ import annotations

import math
import sys
import types

import attention_cases
import pytest
import torch
from conftest import (
    CALL,
    FP32_EPS,
    NO_TRITON,
    cast,
    changed,
    loop_inputs,
    relative_error,
    require_grad,
    small_model,
)

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import providers
from looped_fast.kernels.launch import recording
from looped_fast.kernels.providers import PROVIDERS, SHORT

from looped_fast import config, explain_backend, ops
from looped_fast.ops import backends

ON_GPU = changed(CALL, device="cuda", precision="bf16")
LONG = changed(ON_GPU, seq_len=SHORT + 2)


@pytest.fixture
def ampere(monkeypatch):
    """A GPU and a PyTorch that FlashAttention runs on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


class FlashAttn:
    """A stand-in for flash-attn: its two functions, computed by formula."""

    def _flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, return_softmax,
    ):  # fmt: skip
        self.check(q, dropout_p, softmax_scale, window_size_left, window_size_right, softcap)
        assert alibi_slopes is None
        assert return_softmax is False
        B, S = q.shape[:2]
        qkv = torch.stack((q, k, v), dim=2).view(B, S, -1)
        out, lse = attention_cases.by_formula(qkv.double(), q.shape[2], causal)
        return out.view(q.shape).to(q.dtype), lse.float(), torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        self.check(q, dropout_p, softmax_scale, window_size_left, window_size_right, softcap)
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        B, S, H, _ = q.shape
        assert softmax_lse.shape == (B, H, S)
        qkv = torch.stack((q, k, v), dim=2).view(B, S, -1)
        exact = attention_cases.differentiated(
            attention_cases.by_formula, qkv.double(), dout.reshape(B, S, -1).double(), H, causal
        )
        lse = attention_cases.by_formula(qkv.double(), H, causal)[1].float()
        torch.testing.assert_close(softmax_lse, lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.double(), exact["out"].view(q.shape), rtol=1e-2, atol=1e-2)
        for filled, name in ((dq, "dq"), (dk, "dk"), (dv, "dv")):
            assert filled.stride(-1) == 1
            filled.copy_(exact[name].view(q.shape))

    def check(self, q, dropout, scale, left, right, softcap):
        assert (dropout, left, right, softcap) == (0.0, -1, -1, 0.0)
        assert scale == 1 / math.sqrt(q.shape[-1])


@pytest.fixture
def flash_attn(monkeypatch):
    """An installed flash-attn; tests may change its version."""
    package, functions = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    package.__version__ = "2.8.3"
    package.flash_attn_interface = functions
    functions._flash_attn_forward = FlashAttn()._flash_attn_forward
    functions._flash_attn_backward = FlashAttn()._flash_attn_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", functions)
    providers._flash_attn_load_error.cache_clear()
    yield package
    providers._flash_attn_load_error.cache_clear()


@pytest.fixture
def no_flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    providers._flash_attn_load_error.cache_clear()
    yield
    providers._flash_attn_load_error.cache_clear()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_is_as_good_as_plain_pytorch(name, precision, causal, flash_attn):
    qkv, d_out = attention_cases.inputs(2, 13, 2, 16, precision)
    attention_cases.check(PROVIDERS[name], qkv, d_out, 2, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("S", [82, 203])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_that_runs_here_is_as_good_as_plain_pytorch(name, S, causal):
    if reason := PROVIDERS[name].unsupported(changed(ON_GPU, seq_len=S)):
        pytest.skip(reason)
    qkv, d_out = (x.cuda() for x in attention_cases.inputs(16, S, 8, 32, "bf16"))
    attention_cases.check(PROVIDERS[name], qkv, d_out, 8, causal)


@pytest.mark.gpu
def test_our_kernel_repeats_bit_for_bit():
    qkv, d_out = (x.cuda() for x in attention_cases.inputs(16, 82, 8, 32, "bf16"))
    first = attention_cases.provided(PROVIDERS["triton"], qkv, d_out, 8)
    for _ in range(10):
        again = attention_cases.provided(PROVIDERS["triton"], qkv, d_out, 8)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_pytorchs_gpu_ops_take_what_they_are_given():
    # Their schemas and shapes, on a device without memory.
    qkv, d_qkv = torch.empty(2, 2, 13, 96, device="meta", dtype=torch.bfloat16)
    out, d_out = torch.empty(2, 2, 13, 32, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(2, 2, 13, device="meta")
    for causal in (True, False):
        PROVIDERS["sdpa"].forward(qkv, out, lse, 2, causal)
        PROVIDERS["sdpa"].backward(qkv, out, lse, d_out, d_qkv, 2, causal)


def test_the_loop_runs_on_a_forced_provider():
    inputs = loop_inputs(B=1, S=5, D=64)
    grad = torch.randn(1, 1, 5, 64)

    def run(dtype, **settings):
        tensors = require_grad(cast(inputs, dtype))
        states = ops.loop(**tensors, n_heads=4, n_loops=2, window=1, **settings)
        (states * grad).sum().backward()
        return states, tensors["weights"][2].grad  # gradient of Wqkv

    exact = run(torch.float64, backend="reference")
    plain = run(torch.float32, backend="reference", precision="bf16")
    with recording() as launches:
        ours = run(torch.float32, backend="triton", precision="bf16", attention="sdpa")
    assert not any("attention" in launch.name for launch in launches)
    for factor, truth, value, yardstick in zip((2, 3), exact, ours, plain, strict=True):
        allowed = factor * relative_error(yardstick, truth) + 4 * FP32_EPS
        assert relative_error(value, truth) <= allowed


def test_the_library_knows_the_providers_names():
    assert set(config.ATTENTION) == set(PROVIDERS)
    assert tuple(backends.UNSUPPORTED) == config.BACKENDS


def test_short_sequences_go_to_our_kernel(ampere, flash_attn):
    choice = providers.select(ON_GPU)
    assert choice.chosen == "triton"
    assert choice.reasons == dict.fromkeys(
        ("flash_attn", "sdpa"), "triton comes first up to 256 tokens"
    )


def test_long_sequences_go_to_flash_attn_where_it_is_installed(ampere, flash_attn):
    choice = providers.select(LONG)
    assert choice.chosen == "flash_attn"
    assert choice.reasons["sdpa"] == "flash_attn comes first beyond 256 tokens"


def test_long_sequences_go_to_pytorch_otherwise(ampere, no_flash_attn):
    choice = providers.select(LONG)
    assert choice.chosen == "sdpa"
    assert "not installed" in choice.reasons["flash_attn"]


def test_fp32_goes_to_our_kernel(ampere, flash_attn):
    choice = providers.select(changed(LONG, precision="fp32"))
    assert choice.chosen == "triton"
    assert set(choice.reasons.values()) == {"it multiplies bf16 and fp16 only, not fp32"}


def test_old_gpus_have_only_our_kernel(ampere, flash_attn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    choice = providers.select(LONG)
    assert choice.chosen == "triton"
    assert all("capability (8, 0), this GPU has (7, 5)" in r for r in choice.reasons.values())


def test_pytorchs_own_switch_is_obeyed(ampere, no_flash_attn):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        choice = providers.select(LONG)
    assert choice.chosen == "triton"
    assert "switched off" in choice.reasons["sdpa"]


def test_a_forced_provider_is_taken(ampere, flash_attn):
    for name in PROVIDERS:
        choice = providers.select(changed(ON_GPU, attention=name))
        assert choice.chosen == name
        assert set(choice.reasons.values()) == {f"{name} was asked for"}


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (changed(LONG, attention="sdpa", precision="fp32"), "'sdpa' can't run this: .* not fp32"),
        (changed(LONG, attention="flash_attn", device="cpu"), "can't run .*: tensors are on cpu"),
        (changed(LONG, attention="flash_attn"), "can't run this: flash-attn is not installed"),
        (changed(LONG, attention="flash"), "unknown attention 'flash'; did you mean 'flash_attn'"),
    ],
)
def test_a_forced_provider_that_cannot_run_says_why(problem, reason, ampere, no_flash_attn):
    with pytest.raises(ValueError, match=reason):
        providers.select(problem)


def test_an_old_flash_attn_is_named(ampere, flash_attn):
    flash_attn.__version__ = "2.6.3"
    assert providers.select(LONG).reasons["flash_attn"] == (
        "flash-attn is 2.6.3; 2.7 or later is needed"
    )


def test_a_broken_flash_attn_is_named(ampere, tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: c10')")
    monkeypatch.syspath_prepend(tmp_path)
    providers._flash_attn_load_error.cache_clear()
    assert providers.select(LONG).reasons["flash_attn"] == (
        "flash-attn does not load: undefined symbol: c10"
    )
    providers._flash_attn_load_error.cache_clear()


def test_explain_backend_names_the_provider_of_attention(ampere, no_flash_attn, monkeypatch):
    able = {name: lambda problem: None for name in ("triton", "reference")}
    monkeypatch.setattr(backends, "UNSUPPORTED", able)
    model = small_model()
    model.backend, model.attention = "triton", "sdpa"
    assert str(explain_backend(model, batch_size=2, n_points=5, precision="bf16")) == (
        "backend: triton\n"
        "  not reference: triton was asked for\n"
        "attention: sdpa\n"
        "  not triton: sdpa was asked for\n"
        "  not flash_attn: tensors are on cpu"
    )


def test_a_forced_provider_needs_the_triton_backend(monkeypatch):
    able = {"triton": lambda problem: "no GPU here", "reference": lambda problem: None}
    monkeypatch.setattr(backends, "UNSUPPORTED", able)
    with pytest.raises(ValueError, match=r"'sdpa' needs the triton backend: no GPU here\. Use"):
        ops.loop(**loop_inputs(), n_heads=2, n_loops=1, window=1, attention="sdpa")
