"""What PyTorch's autograd promises around a model: checkpoints, hooks, batches of gradients, ..."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import loop_inputs, needs_engine, needs_triton, require_grad, small_model
from torch.utils.checkpoint import checkpoint

from looped_fast import LoopedTransformer, ops

BACKENDS = [
    pytest.param("cpu", marks=needs_engine),
    pytest.param("triton", marks=needs_triton),
    "reference",
]
FAST = BACKENDS[:2]
ARGUMENTS = {"n_heads": 4, "n_loops": 3, "window": 2}


def case(backend: str, recompute: bool = False):
    """A model, and prompts for it."""
    model = small_model(n_embd=64, n_head=4, n_loops=3)
    model.backend, model.recompute = backend, recompute
    return model, torch.randn(2, 4, 3), torch.randn(2, 4)


def error(model: LoopedTransformer, xs, ys):
    return (model(xs, ys) - ys).square().mean()


LOSSES = [error, LoopedTransformer.loss]


def gradients(loss, model, **arguments):
    return torch.autograd.grad(loss, list(model.parameters()), **arguments)


def assert_equal(found, expected, rtol=0.0, atol=0.0):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_a_checkpoint_are_those_without_it(backend, reentrant, loss):
    model, xs, ys = case(backend)
    expected = gradients(loss(model, xs, ys), model)
    xs.requires_grad_()  # or a reentrant checkpoint would have no graph
    loss_again = checkpoint(loss, model, xs, ys, use_reentrant=reentrant)
    loss_again.backward()
    assert_equal([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", FAST)
def test_saved_tensors_are_unpacked_once_and_may_come_back_in_other_memory(
    backend, loss, recompute
):
    model, xs, ys = case(backend, recompute)
    expected = gradients(loss(model, xs, ys), model)
    unpacked: list[int] = []

    def pack(tensor):
        # The same values in another order of memory.
        last_first = tuple(reversed(range(tensor.dim())))
        copy = tensor.detach().permute(last_first).contiguous().permute(last_first)
        return len(unpacked), unpacked.append(0), copy

    def unpack(packed):
        unpacked[packed[0]] += 1
        return packed[2]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = gradients(loss(model, xs, ys), model)
    assert max(unpacked) == 1
    assert_equal(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", FAST)
def test_activations_may_wait_on_the_cpu(backend):
    model, xs, ys = case(backend)
    expected = gradients(error(model, xs, ys), model)
    with torch.autograd.graph.save_on_cpu():
        loss = error(model, xs, ys)
    assert_equal(gradients(loss, model), expected)


@needs_engine
def test_activations_that_a_hook_returns_in_another_dtype_are_refused():
    model, xs, ys = case("cpu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
        loss = error(model, xs, ys)
    with pytest.raises(ValueError, match="float32 tensors"):
        loss.backward()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_may_change_in_place(backend, recompute):
    model, xs, ys = case(backend, recompute)
    expected = gradients((3 * (model(xs, ys) - ys)).square().mean(), model)
    predictions = model(xs, ys)
    predictions -= ys
    predictions[0].mul_(3)
    predictions[1] *= 3
    assert_equal(gradients(predictions.square().mean(), model), expected, 1e-6, 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_may_change_in_place(backend):
    def grads(change):
        inputs = require_grad(loop_inputs(B=1, S=4, D=64, dtype=torch.float32))
        states = change(ops.loop(**inputs, **ARGUMENTS, backend=backend))
        states.square().sum().backward()
        return [inputs["embeddings"].grad, *(w.grad for w in inputs["weights"])]

    torch.manual_seed(0)
    expected = grads(lambda states: 2 * states)
    torch.manual_seed(0)
    assert_equal(grads(lambda states: states.mul_(2)), expected, 1e-6, 1e-7)


@pytest.mark.parametrize("backend", FAST)
def test_states_that_the_backward_reads_are_guarded_by_their_version(backend):
    inputs = require_grad(loop_inputs(B=1, S=4, D=64, dtype=torch.float32))
    states = ops.loop(**inputs, **ARGUMENTS, backend=backend, recompute=True)
    states.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.sum().backward()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_is_kept_gives_the_same_twice(backend, loss):
    model, xs, ys = case(backend)
    value = loss(model, xs, ys)
    first = gradients(value, model, retain_graph=True)
    assert_equal(gradients(value, model), first)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the reference's attention
@pytest.mark.parametrize("trained", ["", "_read_out", "_read_in"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_gradients_are_those_one_by_one(backend, trained):
    model, xs, ys = case(backend)
    parameters = [p for name, p in model.named_parameters() if name.startswith(trained)]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in parameters))
    predictions = model(xs, ys)
    vectors = torch.randn(3, *predictions.shape)

    def grad(vector, **arguments):
        return torch.autograd.grad(predictions, parameters, vector, retain_graph=True, **arguments)

    expected = [torch.stack(grads) for grads in zip(*map(grad, vectors), strict=True)]
    assert_equal(grad(vectors, is_grads_batched=True), expected, 1e-5, 1e-6)
    assert_equal(torch.vmap(grad)(vectors), expected, 1e-5, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_gradients_of_a_loss(backend):
    model, xs, ys = case(backend)
    loss = model.loss(xs, ys)
    expected = gradients(loss, model, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.5])
    found = gradients(loss, model, grad_outputs=factors, is_grads_batched=True)
    assert_equal(found, [torch.stack([f * g for f in factors]) for g in expected], 1e-5, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vectorised_jacobian_is_that_of_a_loop(backend):
    model, xs, ys = case(backend)
    jacobian = torch.autograd.functional.jacobian
    found, expected = (jacobian(lambda x: model(x, ys), xs, vectorize=v) for v in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("around_forward", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_a_backward_is_the_same_inside_an_autocast(backend, around_forward, loss):
    """Plain PyTorch multiplies gradients in bf16 there; the op's precision is its forward's."""
    model, xs, ys = case(backend)
    xs.requires_grad_()
    tensors = [xs, *model.parameters()]

    def grads(around_backward):
        with torch.autocast("cpu", torch.bfloat16, enabled=around_forward):
            value = loss(model, xs, ys)
        with torch.autocast("cpu", torch.bfloat16, enabled=around_backward):
            return torch.autograd.grad(value, tensors)

    found, expected = grads(True), grads(False)
    assert {g.dtype for g in found} == {torch.float32}
    assert_equal(found, expected)


@pytest.mark.parametrize("backend", FAST)
def test_a_read_out_alone_has_the_same_gradient_inside_an_autocast(backend):
    model, xs, ys = case(backend)
    model.requires_grad_(False)
    model._read_out.requires_grad_()
    parameters = list(model._read_out.parameters())
    loss = error(model, xs, ys)
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(torch.autograd.grad(loss, parameters), expected)


@needs_engine
def test_the_read_in_has_second_derivatives():
    xs, ys, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 2), (2, 3), (4, 2), (4,))
    )
    assert torch.autograd.gradcheck(ops.read_in, (xs, ys, weight, bias))
    assert torch.autograd.gradgradcheck(ops.read_in, (xs, ys, weight, bias))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives_are_refused_also_of_what_is_batched(backend, loss):
    model, xs, ys = case(backend)
    first = gradients(loss(model, xs, ys), model, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        first[0].sum().backward()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_into_some_tensors_leaves_the_others_alone(backend, loss):
    model, xs, ys = case(backend)
    xs.requires_grad_()
    weight = model._backbone.transformer["h"][0].mlp.c_fc.weight
    expected = torch.autograd.grad(loss(model, xs, ys), [xs, weight])
    loss(model, xs, ys).backward(inputs=[xs, weight])
    assert_equal([xs.grad, weight.grad], expected)
    others = (p for p in model.parameters() if p is not weight)
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_of_parameters_run_once_with_the_gradient(backend):
    model, xs, ys = case(backend)
    expected = dict(zip(model.state_dict(), gradients(error(model, xs, ys), model), strict=True))
    seen, accumulated = {}, {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad))
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: accumulated.setdefault(name, []).append(p.grad)
        )
    error(model, xs, ys).backward()
    for found in (seen, accumulated):
        assert found.keys() == expected.keys()
        assert all(len(grads) == 1 for grads in found.values())
        assert_equal([grads[0] for grads in found.values()], [expected[name] for name in found])


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_in_another_thread_and_in_anomaly_mode(backend, loss):
    model, xs, ys = case(backend)
    expected = gradients(loss(model, xs, ys), model)
    with torch.autograd.detect_anomaly(check_nan=True):
        value = loss(model, xs, ys)
        thread = threading.Thread(target=value.backward)
        thread.start()
        thread.join()
    assert_equal([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_without_gradient_has_none_later(backend):
    model, xs, ys = case(backend)
    with torch.no_grad():
        predictions = model(xs, ys)
    assert not predictions.requires_grad
    predictions.requires_grad_().sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_of_one_step_have_the_gradient_of_a_shorter_loop(backend):
    """Gradients of steps that the loss leaves out are zeros, not leftovers of memory."""
    model, xs, ys = case(backend)
    found = gradients(model(xs, ys, n_loops=3, window=3)[0].sum(), model)
    expected = gradients(model(xs, ys, n_loops=1, window=1)[0].sum(), model)
    assert_equal(found, expected, rtol=1e-5, atol=1e-6)
