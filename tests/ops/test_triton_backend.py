"""The triton backend through its public ops, with interpreted kernels."""

from __future__ import annotations

import pytest
import torch
from conftest import FP32_EPS, NO_TRITON, cast, leaves, loop_inputs, relative_error, require_grad
from golden_cases import MODEL_CASES, assert_as_good_as_plain, load_tensors, with_prefix
from looped_fast.kernels.saved_activations import SavedActivations
from test_cpu_engine import golden_results, golden_truth

from looped_fast import LoopedTransformer, ModelConfig, ops
from looped_fast.ops.block import GPT2

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)


# Other cases differ only in numbers of loops and blocks, which test_kernels_* vary.
OTHER_CASES = {"looped_tiny", "looped_tiny_window_covers_all", "standard_tiny"}


@pytest.mark.parametrize("name", [name for name in MODEL_CASES if name not in OTHER_CASES])
def test_recorded_runs_are_met_as_well_as_by_plain_pytorch(name):
    case, truth = golden_truth(name)
    plain = golden_results(case, "fp32", torch.float32, "reference")
    fast = golden_results(case, "fp32", torch.float32, "triton")
    assert_as_good_as_plain(case, fast, plain, truth)


def trained(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses of a few training steps on one recorded batch, and the parameters after them."""
    case, tensors = load_tensors("train_looped_tiny")
    config = ModelConfig(
        n_dims=case["n_dims"], n_positions=case["n_positions"], n_embd=case["n_embd"],
        n_head=case["n_head"], n_loops=3, window=2,
    )  # fmt: skip
    model = LoopedTransformer(config, backend=backend)
    model.load_state_dict(with_prefix(tensors, "init/"))
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    xs, ys = tensors["xs"][0, :2, :5].to(dtype), tensors["ys"][0, :2, :5].to(dtype)
    losses = []
    for _ in range(3):
        loss = (model(xs, ys) - ys).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    return {"losses": torch.stack(losses), **{n: p.detach() for n, p in model.named_parameters()}}


def test_training_is_as_in_plain_pytorch():
    truth = trained("reference", torch.float64)
    plain = trained("reference", torch.float32)
    fast = trained("triton", torch.float32)
    for name, exact in truth.items():
        plain_error, error = (relative_error(run[name], exact) for run in (plain, fast))
        assert error <= 3 * plain_error + 4 * FP32_EPS, name


@pytest.mark.parametrize(("n_loops", "n_outputs"), [(2, 0), (1, 2)])
def test_the_ops_pass_opcheck(n_loops, n_outputs):
    inputs = loop_inputs(B=1, S=3, D=64, dtype=torch.float32, n_outputs=n_outputs)
    inputs["weights"] += inputs.pop("read_out", [])
    if n_outputs:
        inputs["state"] = None
    targets = torch.randn(1, 2, n_outputs) if n_outputs else None
    settings = (4, n_loops, 1, "mul", "bf16", False, "auto", "triton", *GPT2)
    others = (targets, None, True, n_loops > 1)
    forward = torch.ops.looped_fast.triton_loop_forward.default
    result, *saved = forward(*inputs.values(), *settings, *others)
    grad, n_gradients = torch.randn_like(result), 3 + len(inputs["weights"])
    if not n_outputs:
        saved[SavedActivations._fields.index("states")] = result
    for wanted in ([True] * n_gradients, [i % 3 > 0 for i in range(n_gradients)]):
        torch.library.opcheck(
            torch.ops.looped_fast.triton_loop_backward.default,
            (grad, saved, *inputs.values(), wanted, *settings),
        )
    for tensor in (inputs["embeddings"], inputs["positions"], *inputs["weights"]):
        tensor.requires_grad_()
    torch.library.opcheck(forward, (*inputs.values(), *settings, *others))


@pytest.mark.parametrize(
    ("injection", "S", "n_outputs", "n_supervised", "recompute"),
    [
        ("add", 6, 1, 2, False), ("add", 7, 2, 1, False), ("mul", 6, 1, 1, True),
        ("none", 7, 1, 2, False), ("add", 5, 9, 2, False),
    ],
)  # fmt: skip
def test_the_loss_is_as_accurate_as_plain_pytorch(injection, S, n_outputs, n_supervised, recompute):
    inputs = loop_inputs(B=3, S=S, D=64, n_outputs=n_outputs)
    targets = torch.randn(3, (S + 1) // 2, n_outputs, dtype=torch.float64)
    settings = {
        "n_heads": 4, "n_loops": 3, "window": 2, "injection": injection, "recompute": recompute
    }  # fmt: skip

    def results(dtype, precision, backend):
        given = require_grad(cast(inputs, dtype))
        loss = ops.loop_mse(
            **given, targets=targets.to(dtype), n_supervised=n_supervised, precision=precision,
            backend=backend, **settings,
        )  # fmt: skip
        tensors = leaves(given)
        grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        return {"loss": loss.detach()} | dict(zip(tensors, grads, strict=True))

    truth = results(torch.float64, "fp32", "reference")
    plain = results(torch.float32, "fp32", "reference")
    fast = results(torch.float32, "fp32", "triton")
    for name, exact in truth.items():
        if exact is None:
            assert fast[name] is None, name
            continue
        error, of_plain = (relative_error(run[name], exact) for run in (fast, plain))
        factor = 2 if name == "loss" else 3
        assert error <= factor * of_plain + 4 * FP32_EPS, name


def test_gradients_of_a_fresh_model_keep_to_the_rule():
    """Its bf16 products lose little, so errors of what is saved in 16 bits show."""
    config = ModelConfig(n_dims=5, n_positions=11, n_embd=64, n_head=4, n_loops=2, window=1)
    fresh = LoopedTransformer(config)
    xs, ys = torch.randn(2, 11, 5), torch.randn(2, 11)

    def gradients(dtype, backend, low):
        model = LoopedTransformer(config, backend=backend)
        model.load_state_dict(fresh.state_dict())
        model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model.loss(xs.to(dtype), ys.to(dtype))
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    truth = gradients(torch.float64, "reference", low=False)
    plain = gradients(torch.float32, "reference", low=True)
    fast = gradients(torch.float32, "triton", low=True)
    for name, exact in truth.items():
        error, of_plain = (relative_error(run[name], exact) for run in (fast, plain))
        assert error <= 3 * of_plain + 4 * FP32_EPS, name


def test_targets_may_want_a_gradient():
    inputs = loop_inputs(B=1, S=4, D=64, n_outputs=1, dtype=torch.float32)
    targets = torch.randn(1, 2, 1, requires_grad=True)
    settings = {"n_heads": 4, "n_loops": 1, "window": 1}
    grads = [
        torch.autograd.grad(
            ops.loop_mse(**inputs, targets=targets, backend=backend, **settings), targets
        )[0]
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_is_one_graph_with_the_same_numbers():
    inputs = require_grad(loop_inputs(B=1, S=5, D=64, dtype=torch.float32))

    def loss():
        states = ops.loop(
            **inputs, n_heads=4, n_loops=2, window=1, precision="bf16", backend="triton"
        )
        return states.square().mean()

    tensors = list(leaves(inputs).values())
    eager = torch.autograd.grad(loss(), tensors, allow_unused=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = torch.autograd.grad(compiled(), tensors, allow_unused=True)
    for expected, grad in zip(eager, grads, strict=True):
        assert (expected is None) == (grad is None)
        assert grad is None or torch.equal(grad, expected)


def test_a_backward_inside_autocast_keeps_its_precision():
    inputs = require_grad(loop_inputs(B=1, S=5, D=64, dtype=torch.float32))
    tensors = list(leaves(inputs).values())
    loss = ops.loop(**inputs, n_heads=4, n_loops=1, window=1, backend="triton").square().mean()
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(loss, tensors)
    assert all(map(torch.equal, grads, expected))


def test_an_empty_batch_is_no_error():
    inputs = require_grad(loop_inputs(B=0, S=4, D=64, dtype=torch.float32))
    states = ops.loop(**inputs, n_heads=4, n_loops=2, window=2, backend="triton")
    assert states.shape == (2, 0, 4, 64)
    states.sum().backward()
    assert all(w.grad.abs().sum() == 0 for w in inputs["weights"])
