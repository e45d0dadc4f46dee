"""torch.compile around a model: one graph, the same numbers, and few compilations."""

import pytest
import torch
from conftest import FP32_EPS, needs_engine, prompt, relative_error, small_model
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = needs_engine


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def model():
    """A model whose sizes the CPU engine takes."""
    return small_model(n_embd=32, n_head=4, n_loops=3)


def test_many_loop_counts_need_few_compilations(model, counter):
    compiled, (xs, ys) = torch.compile(model, backend=counter, fullgraph=True), prompt()
    for n_loops in range(1, 16):
        assert torch.equal(compiled(xs, ys, n_loops), model(xs, ys, n_loops))
    assert counter.frame_count <= 3  # 1; up to the window; beyond it


def test_many_windows_need_few_compilations(model, counter):
    compiled, (xs, ys) = torch.compile(model, backend=counter, fullgraph=True), prompt()
    with torch.no_grad():
        for n_loops in range(2, 16):
            arguments = xs, ys, n_loops, max(1, n_loops // 2)
            assert torch.equal(compiled(*arguments), model(*arguments))
    assert counter.frame_count <= 3


def test_many_losses_need_few_compilations(model, counter):
    compiled, (xs, ys) = torch.compile(model.loss, backend=counter, fullgraph=True), prompt()
    for n_loops in range(3, 15):
        arguments = xs, ys, n_loops, n_loops - 1, max(1, n_loops // 2)
        gradients = []
        for loss in (compiled, model.loss):
            model.zero_grad()
            loss(*arguments).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for found, expected in zip(*gradients, strict=True):
            assert relative_error(found, expected) < 9 * FP32_EPS
    assert counter.frame_count <= 3


def test_a_curriculum_of_sizes_and_loop_counts_needs_few_compilations(model, counter):
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(15):
        (xs, ys), n_loops = prompt(B=2 + step % 4, n=2 + step % 7), 3 + step
        loss = (compiled(xs, ys, n_loops) - ys).square().mean()
        expected = (model(xs, ys, n_loops) - ys).square().mean()
        (found,) = torch.autograd.grad(loss, [model._read_in.weight])
        (right,) = torch.autograd.grad(expected, [model._read_in.weight])
        assert relative_error(loss, expected) < 9 * FP32_EPS
        assert relative_error(found, right) < 9 * FP32_EPS
    assert counter.frame_count <= 4


def test_batches_of_any_size_need_few_compilations(model, counter):
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for B in (1, 2, 3, 5):
            for n in (1, 2, 5, 8):
                xs, ys = prompt(B, n)
                assert torch.equal(compiled(xs, ys), model(xs, ys))
    assert counter.frame_count <= 4  # a size of 1 is always compiled by itself


@pytest.mark.parametrize("dynamic", [True, False])
def test_loop_counts_follow_the_setting_of_torch_compile(model, counter, dynamic):
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    xs, ys = prompt()
    with torch.no_grad():
        for n_loops in (3, 4, 5, 6):
            assert torch.equal(compiled(xs, ys, n_loops), model(xs, ys, n_loops))
    assert counter.frame_count == (1 if dynamic else 4)


def test_a_compiled_call_follows_autocast_at_any_loop_count(model, counter):
    compiled, (xs, ys) = torch.compile(model, backend=counter, fullgraph=True), prompt()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for n_loops in range(3, 12):
            found = compiled(xs.bfloat16(), ys, n_loops)
            assert torch.equal(found, model(xs.bfloat16(), ys, n_loops))
    assert counter.frame_count <= 2


def test_a_bad_window_of_a_compiled_call_is_named(model, counter):
    compiled, (xs, ys) = torch.compile(model, backend=counter), prompt()
    compiled(xs, ys, 4)
    compiled(xs, ys, 5)
    with pytest.raises(ValueError, match=r"window = 7 is outside 1\.\.6 \(n_loops\)"):
        compiled(xs, ys, 6, 7)
