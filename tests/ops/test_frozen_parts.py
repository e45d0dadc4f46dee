"""Parts of a model that are not trained: right gradients of the others, and no work for these."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import (
    FP32_EPS,
    cast,
    leaves,
    loop_inputs,
    needs_engine,
    needs_triton,
    relative_error,
    require_grad,
    small_model,
)

from looped_fast import ops
from looped_fast.ops import cpu_engine, triton_backend
from looped_fast.ops.block import GPT2, block_names

FAST = [
    pytest.param("cpu", marks=needs_engine),
    pytest.param("triton", marks=needs_triton),
]
NAMES = block_names(GPT2)
N = len(NAMES)
MATRICES = [i for i, name in enumerate(NAMES) if "ln" not in name and "weight" in name]
# Name -> names of ``leaves`` that are trained, of a loop of two blocks.
PARTS = {
    "read-out": ["read_out[0]", "read_out[1]"],
    "read-out's bias": ["read_out[1]"],
    "embeddings": ["embeddings"],
    "positions": ["positions"],
    "state": ["state"],
    "LayerNorms": [f"weights[{i}]" for i in range(2 * N + 2) if i >= 2 * N or "ln" in NAMES[i % N]],
    "biases": [f"weights[{i}]" for i in range(2 * N + 1) if i < 2 * N and "bias" in NAMES[i % N]],
    **{f"{NAMES[i]} of a block": [f"weights[{i + N * (i % 4 > 0)}]"] for i in MATRICES},
}
SETTINGS = {"n_heads": 4, "n_loops": 3, "window": 3}


def results(inputs, names, backend, loss, **changes):
    """Gradients of the tensors that are trained, by name."""
    inputs = cast(inputs, torch.float32)
    tensors = {name: t for name, t in leaves(inputs).items() if name in names}
    for tensor in tensors.values():
        tensor.requires_grad_()
    settings = {**SETTINGS, "backend": backend, **changes}
    targets = torch.linspace(-1, 1, 2 * 3).reshape(2, 3, 1)
    if loss == "mse":
        value = ops.loop_mse(**inputs, targets=targets, n_supervised=2, **settings)
    else:
        value = (ops.loop(**inputs, **settings)[-2:] - targets).square().mean()
    value.backward()
    assert all(t.grad is None for name, t in leaves(inputs).items() if name not in names)
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


CASES = {
    "loss": ("mse", {}),
    "loss, every block": ("mse", {"injection": "every_block", "window": 2}),
    "predictions": ("predictions", {}),
    "recomputed": ("predictions", {"injection": "mul", "recompute": True}),
    "bf16": ("predictions", {"injection": "none", "precision": "bf16"}),
}


@functools.cache
def trained_whole(backend, name):
    """Inputs, and the gradients of a model that is trained whole."""
    torch.manual_seed(0)
    inputs = loop_inputs(B=2, S=6, D=64, n_layer=2, dtype=torch.float32, n_outputs=1)
    loss, changes = CASES[name]
    return inputs, results(inputs, list(leaves(inputs)), backend, loss, **changes)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(pytest.param("cpu", name, marks=needs_engine) for name in CASES),
        pytest.param("triton", "loss, every block", marks=needs_triton),
        pytest.param("triton", "recomputed", marks=needs_triton),
    ],
)
def test_gradients_of_a_part_are_those_of_a_model_that_is_trained_whole(backend, name, part):
    loss, changes = CASES[name]
    precision = changes.get("precision", "fp32")
    if backend == "cpu" and (reason := cpu_engine.unsupported_precision(precision)):
        pytest.skip(reason)
    inputs, whole = trained_whole(backend, name)
    found = results(inputs, PARTS[part], backend, loss, **changes) if flows(part, changes) else {}
    assert found.keys() == whole.keys() & PARTS[part]
    for tensor, grad in found.items():
        # A read-out that is trained alone sums its gradient in another order.
        limit = 64 * FP32_EPS if part.startswith("read-out") else 0
        assert relative_error(grad, whole[tensor]) <= limit, tensor


def flows(part: str, changes: dict) -> bool:
    """True if the loss depends on the part through steps that carry gradient."""
    if part == "state":
        return changes.get("window", 3) == 3
    return part != "embeddings" or changes.get("injection") != "none"


@pytest.mark.parametrize("loss", ["mse", "predictions"])
@pytest.mark.parametrize("backend", FAST)
def test_a_read_out_alone_is_trained_on_states_without_a_backward_of_the_loop(
    backend, loss, monkeypatch
):
    saved = []

    def fail(*_):
        raise AssertionError("the loop's backward ran")

    module = cpu_engine if backend == "cpu" else triton_backend
    namespace, forward = torch.ops.looped_fast, f"{backend}_loop_forward"
    run = getattr(namespace, forward)

    def spy(*arguments):
        outputs = run(*arguments)
        saved.extend(outputs[1:])
        return outputs

    monkeypatch.setattr(namespace, forward, spy)
    monkeypatch.setattr(namespace, f"{backend}_loop_backward", fail)
    assert module.can_read_out([torch.empty(1, 64), torch.empty(1)])
    inputs = loop_inputs(B=2, S=6, D=64, dtype=torch.float32, n_outputs=1)
    assert results(inputs, PARTS["read-out"], backend, loss).keys() == set(PARTS["read-out"])
    # Of what grows with the batch only states, [W, B, S, D], were kept.
    weights = {12 * 64 * 64, 9 * 64}  # folded, on the triton backend
    assert {tensor.numel() for tensor in saved} - weights == {0, 3 * 2 * 6 * 64}


@pytest.mark.parametrize("backend", FAST)
def test_a_wide_read_out_alone_is_trained(backend):
    inputs = loop_inputs(B=2, S=6, D=64, dtype=torch.float32, n_outputs=9)
    grads = []
    for chosen in (backend, "reference"):
        case = cast(inputs, torch.float32)
        parameters = [t.requires_grad_() for t in case["read_out"]]
        predictions = ops.loop(**case, **SETTINGS, backend=chosen)
        grads.append(torch.autograd.grad(predictions.square().sum(), parameters))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@needs_engine
@pytest.mark.parametrize("part", PARTS)
def test_the_engine_returns_gradients_of_trained_tensors_only(part, monkeypatch):
    ran = []
    run = torch.ops.looped_fast.cpu_loop_backward

    def spy(*arguments):
        ran.append(run(*arguments))
        return ran[-1]

    monkeypatch.setattr(torch.ops.looped_fast, "cpu_loop_backward", spy)
    inputs = loop_inputs(B=2, S=6, D=64, n_layer=2, dtype=torch.float32, n_outputs=1)
    results(inputs, PARTS[part], "cpu", "predictions")
    for grads in ran:
        full = [name for name, grad in zip(leaves(inputs), grads, strict=True) if grad.numel()]
        assert full == PARTS[part]


@needs_triton
@pytest.mark.parametrize(
    ("part", "products"),
    [
        ("embeddings", 0), ("biases", 0), ("LayerNorms", 4), ("c_fc_weight of a block", 1),
        ("mlp_c_proj_weight of a block", 1), ("whole", 8),
    ],
)  # fmt: skip
def test_the_triton_backend_multiplies_for_gradients_that_are_wanted(part, products, monkeypatch):
    from looped_fast.kernels import weight_gradients

    count, product = [], weight_gradients._product
    monkeypatch.setattr(weight_gradients, "_product", lambda *a: count.append(0) or product(*a))
    inputs = loop_inputs(B=2, S=6, D=64, n_layer=2, dtype=torch.float32, n_outputs=1)
    results(inputs, PARTS.get(part, list(leaves(inputs))), "triton", "predictions")
    assert len(count) == products


@pytest.mark.parametrize("backend", FAST)
def test_frozen_modules_have_no_gradient_and_an_optimizer_leaves_them_alone(backend):
    model = small_model(n_embd=64, n_head=4, n_loops=3)
    model.backend = backend
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.loss(torch.randn(2, 4, 3), torch.randn(2, 4)).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "mlp" in name}


def test_partly_frozen_loops_pass_gradcheck():
    inputs = loop_inputs(B=1, S=4, D=16, n_outputs=1)
    for name in ("embeddings", "positions", "state"):
        for tensor in leaves(require_grad(inputs)).values():
            tensor.requires_grad_(False)
        inputs[name].requires_grad_()

        def loop(tensor, name=name):
            return ops.loop(**{**inputs, name: tensor}, n_heads=2, n_loops=2, window=2)

        assert torch.autograd.gradcheck(loop, inputs[name])
