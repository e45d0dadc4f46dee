"""A prompt gets the same bits in any batch and on any number of threads, on the CPU engine."""

from __future__ import annotations

import pytest
import torch
from conftest import FP32_EPS, needs_engine, prompt, small_model
from torch.utils.flop_counter import FlopCounterMode

from looped_fast import LoopedTransformer, ModelConfig, ops
from looped_fast.ops import cpu_engine, reference

pytestmark = needs_engine
PRECISIONS = [p for p in ("fp32", "bf16") if cpu_engine.unsupported_precision(p) is None]
BATCHES = [64, 1, 2, 3, 5, 16, 17]
POINTS = [*range(1, 13), 41]

MODELS = {
    "head_dim 8": {"n_embd": 32, "n_head": 4},
    "head_dim 32": {"n_embd": 64, "n_head": 2, "n_dims": 5},
    "multiplied": {"n_embd": 64, "n_head": 4, "injection": "mul", "n_dims": 20},
    "not injected": {"n_embd": 32, "n_head": 1, "injection": "none", "n_dims": 1},
    "injected in both blocks": {
        "n_embd": 96, "n_head": 3, "n_layer": 2, "injection": "every_block", "n_dims": 7
    },
    "classification": {"n_embd": 64, "n_head": 8, "n_layer": 2, "pred_type": "classification"},
    "the whole window": {"n_embd": 32, "n_head": 2, "n_loops": 2, "window": 2},
}  # fmt: skip


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def assert_same_bits(model, n_points, threads, batches=BATCHES, thread_counts=(1, 2, 3)):
    xs, ys = prompt(max(batches), n_points, model.config.n_dims)
    with torch.no_grad():
        threads(1)
        together = model(xs, ys)
        for n_threads in thread_counts:
            threads(n_threads)
            for B in batches:
                alone = model(xs[-B:], ys[-B:])
                assert torch.equal(alone, together[:, -B:]), (n_points, B, n_threads)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_predictions_have_the_same_bits_in_any_batch_and_on_any_threads(name, precision, threads):
    model = small_model(**{"n_positions": 41, "n_loops": 3, "window": 2, **MODELS[name]})
    with autocast(precision):
        for n_points in POINTS:
            assert_same_bits(model, n_points, threads)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_paper_s_model_gives_the_same_bits(precision, threads):
    model = LoopedTransformer(ModelConfig(n_loops=3, window=1))
    with autocast(precision):
        for n_points in (1, 2, 4, 7, 41):
            assert_same_bits(model, n_points, threads, batches=[17, 1, 3], thread_counts=(1, 2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_points", [1, 3, 5, 12])
def test_with_gradients_and_without_the_bits_are_the_same(precision, n_points, threads):
    model = small_model(n_embd=64, n_head=4, n_dims=5, n_positions=12)
    xs, ys = prompt(17, n_points, 5)
    with autocast(precision):
        with torch.no_grad():
            expected = model(xs, ys)
        for n_threads in (1, 2):
            threads(n_threads)
            assert torch.equal(model(xs, ys), expected)
            assert torch.equal(model(xs[:1], ys[:1]), expected[:, :1])
            model.recompute = not model.recompute


def test_states_have_the_same_bits(threads):
    model = small_model(n_embd=64, n_head=4, n_dims=5)
    xs, ys = prompt(17, 3, 5)
    together = model.states(xs, ys)
    for n_threads in (1, 2):
        threads(n_threads)
        for B in (1, 2, 5):
            assert torch.equal(model.states(xs[:B], ys[:B]), together[:, :B])


@pytest.mark.parametrize("d", [1, 2, 5, 20, 100])
@pytest.mark.parametrize("D", [32, 96, 256])
def test_a_row_of_the_read_in_does_not_depend_on_the_others(d, D, threads):
    xs, ys = prompt(300, 9, d)
    weight, bias = torch.randn(D, d), torch.randn(D)
    together = ops.read_in(xs, ys, weight, bias)
    for n_threads in (1, 2, 3):
        threads(n_threads)
        for B in (1, 2, 3, 64, 299):
            assert torch.equal(ops.read_in(xs[:B], ys[:B], weight, bias), together[:B])
        for n in range(1, 9):
            assert torch.equal(
                ops.read_in(xs[:, :n], ys[:, :n], weight, bias), together[:, : 2 * n]
            )


@pytest.mark.parametrize(
    ("B", "n", "d"), [(1, 1, 1), (3, 7, 5), (64, 41, 20), (2, 3, 500), (0, 3, 4)]
)
def test_the_read_in_is_as_accurate_as_plain_pytorch_with_its_gradients(B, n, d):
    leaves = [torch.randn(B, n, d), torch.randn(B, n), torch.randn(64, d), torch.randn(64)]
    grad = torch.randn(B, 2 * n, 64)

    def results(read_in, dtype):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        out = read_in(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    truth = results(reference.read_in, torch.float64)
    plain, fast = (results(f, torch.float32) for f in (reference.read_in, ops.read_in))
    for exact, theirs, mine in zip(truth, plain, fast, strict=True):
        size = max(exact.norm(), 1e-30)
        limit = 2 * (theirs - exact).norm() / size + 4 * FP32_EPS
        assert (mine - exact).norm() / size <= limit


def test_the_read_in_has_second_and_batched_derivatives():
    leaves = [t.requires_grad_() for t in (*prompt(2, 3, 5), torch.randn(32, 5), torch.randn(32))]
    results = []
    for read_in in (ops.read_in, reference.read_in):
        out = read_in(*leaves).square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        out = read_in(*leaves)
        basis = torch.eye(out.numel())[:4].view(4, *out.shape)
        batched = torch.autograd.grad(out, leaves, basis, is_grads_batched=True)
        results.append([*first, *second, *batched])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_weights_of_the_read_in_get_no_gradient():
    xs, ys = prompt(2, 3, 5)
    weight, bias = torch.randn(32, 5), torch.randn(32, requires_grad=True)
    ops.read_in(xs, ys, weight, bias).sum().backward()
    assert weight.grad is None
    assert torch.equal(bias.grad, torch.full((32,), 12.0))


def test_prompts_may_have_any_strides():
    xs, ys = torch.randn(5, 3, 2).permute(2, 1, 0), torch.randn(3, 2).mT
    weight, bias = torch.randn(5, 32).mT, torch.randn(64)[::2]
    dense = [t.contiguous() for t in (xs, ys, weight, bias)]
    assert torch.equal(ops.read_in(xs, ys, weight, bias), ops.read_in(*dense))


def test_the_read_in_under_vmap_with_a_flop_counter_and_in_float64():
    xs, ys = prompt(4, 3, 5)
    weight, bias = torch.randn(32, 5), torch.randn(32)
    expected = ops.read_in(xs, ys, weight, bias)
    by_sample = torch.vmap(lambda x, y: ops.read_in(x[None], y[None], weight, bias)[0])(xs, ys)
    torch.testing.assert_close(by_sample, expected)
    with FlopCounterMode(display=False) as counter:
        ops.read_in(xs, ys, weight, bias)
    assert counter.get_total_flops() == 2 * 4 * 6 * 5 * 32
    assert ops.read_in(*(t.double() for t in (xs, ys, weight, bias))).dtype == torch.float64
