"""The interpreted attention kernels against formulas; compile_report checks machine code."""

from __future__ import annotations

import pytest
import torch
from attention_cases import by_formula, check, inputs, provided
from conftest import FP32_EPS, NO_TRITON, relative_error

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import attention, tuning
from looped_fast.kernels.candidates import Config, candidates
from looped_fast.kernels.launch import recording


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("B", "S", "n_heads", "head_dim"),
    [(2, 22, 2, 16), (1, 41, 1, 32), (1, 16, 1, 64), (3, 1, 1, 16), (1, 64, 1, 16)],
)
def test_forward_and_gradients_are_as_good_as_plain_pytorch(
    B, S, n_heads, head_dim, precision, causal
):
    check(attention, *inputs(B, S, n_heads, head_dim, precision), n_heads, causal)


@pytest.mark.parametrize(
    "tiles", sorted({(c.rows, c.columns) for c in candidates(
        "attention_backward_kernel", "sm_80", 32, "bf16")})
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_every_tile_size_gives_the_same(tiles, causal, monkeypatch):
    rows, columns = tiles
    config = Config(rows, columns=columns)
    monkeypatch.setattr(tuning, "choose", lambda *args, **kwargs: config)
    check(attention, *inputs(1, 37, 1, 16, "bf16"), 1, causal)


@pytest.mark.parametrize("causal", [True, False])
def test_large_scores_do_not_overflow(causal):
    qkv, d_out = inputs(1, 22, 1, 16, "fp32")
    qkv[..., :16] *= 300  # scores reach hundreds: their exponentials would not fit
    check(attention, qkv, d_out, 1, causal)


def test_the_log_sum_exp_is_natural_and_exact_to_fp32():
    qkv, d_out = inputs(2, 37, 1, 32, "bf16")
    exact = by_formula(qkv.double(), 1)[1]
    assert relative_error(provided(attention, qkv, d_out, 1)["lse"], exact) <= 2 * FP32_EPS


def test_a_token_does_not_see_later_ones():
    qkv, d_out = inputs(1, 22, 1, 16, "fp32")
    changed, d_early = qkv.clone(), d_out.clone()
    changed[:, 9:] = torch.randn_like(changed[:, 9:])
    d_early[:, 9:] = 0
    first = provided(attention, qkv, d_early, 1)
    second = provided(attention, changed, d_early, 1)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(first[name][:, :9], second[name][:, :9], rtol=0, atol=0)
    assert (first["dk"][:, 9:] == 0).all()


def test_without_a_mask_a_permutation_of_tokens_permutes_the_results():
    qkv, d_out = inputs(1, 22, 1, 16, "fp32")
    order = torch.randperm(22)
    first = provided(attention, qkv, d_out, 1, causal=False)
    second = provided(attention, qkv[:, order], d_out[:, order], 1, causal=False)
    for name in ("out", "dq", "dk", "dv"):
        assert relative_error(second[name], first[name][:, order]) <= 8 * FP32_EPS


@pytest.mark.parametrize("causal", [True, False])
def test_forward_and_backward_are_one_launch_each(causal):
    qkv, d_out = inputs(2, 70, 2, 16, "bf16")
    with recording(execute=False) as launches:
        provided(attention, qkv, d_out, 2, causal)
    names = [launch.name for launch in launches]
    assert names == ["attention_forward_kernel", "attention_backward_kernel"]
    for launch in launches:
        assert launch.grid == (2 * 2, -(-70 // launch.config.rows))
