"""torch.func around a model: the reference runs, and results are those of one call per sample."""

import re

import pytest
import torch
from conftest import FP32_EPS, needs_engine, prompt, relative_error, small_model
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from looped_fast import explain_backend

ENGINE = {"n_embd": 32, "n_head": 4}  # sizes that the CPU engine takes


def engine_model(dtype=torch.float32, **changes):
    return small_model(dtype, **{**ENGINE, **changes})


def call(model, parameters, x, y):
    """Predictions for one prompt, x: [n, d], y: [n]."""
    return functional_call(model, parameters, (x[None], y[None]))[:, 0]


def error(model, parameters, x, y):
    return (call(model, parameters, x, y) - y).square().mean()


class Loss(torch.nn.Module):
    """``model.loss`` as a module, which functional_call needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, xs, ys):
        return self.model.loss(xs, ys)


def fused_error(model, parameters, x, y):
    parameters = {f"model.{name}": p for name, p in parameters.items()}
    return functional_call(Loss(model), parameters, (x[None], y[None]))


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@needs_engine
@pytest.mark.parametrize("changes", [{}, {"pred_type": "classification"}, {"injection": "mul"}])
def test_vmap_equals_a_call_per_prompt(changes):
    model, (xs, ys) = engine_model(**changes), prompt(B=3)
    alone = torch.stack([model(x[None], y[None]) for x, y in zip(xs, ys, strict=True)])
    assert relative_error(vmap(lambda x, y: model(x[None], y[None]))(xs, ys), alone) < 9 * FP32_EPS


@needs_engine
def test_vmap_of_the_loss_equals_a_call_per_prompt():
    model, (xs, ys) = engine_model(), prompt(B=3)
    alone = torch.stack([model.loss(x[None], y[None]) for x, y in zip(xs, ys, strict=True)])
    assert relative_error(vmap(lambda x, y: model.loss(x[None], y[None]))(xs, ys), alone) < 1e-6


def test_vmap_over_another_dimension_and_over_xs_alone():
    model, (xs, ys) = small_model(torch.float64), prompt(B=3, dtype=torch.float64)
    along_last = vmap(lambda x: model(x[None], ys[:1]), in_dims=2, out_dims=1)
    alone = torch.stack([model(x[None], ys[:1]) for x in xs], dim=1)
    torch.testing.assert_close(along_last(xs.permute(1, 2, 0)), alone)


@needs_engine
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", [error, fused_error])
def test_gradients_per_sample_are_those_of_a_backward_per_sample(loss, recompute):
    model, (xs, ys) = engine_model(), prompt(B=3)
    model.recompute = recompute
    per_sample = vmap(grad(lambda *args: loss(model, *args)), in_dims=(None, 0, 0))
    gradients = per_sample(parameters_of(model), xs, ys)
    for i in range(3):
        model.zero_grad()
        (model(xs[i : i + 1], ys[i : i + 1]) - ys[i]).square().mean().backward()
        for name, p in model.named_parameters():
            assert relative_error(gradients[name][i], p.grad) < 64 * FP32_EPS, name


@needs_engine
def test_gradients_per_sample_follow_autocast():
    model, (xs, ys) = engine_model(), prompt(B=2)
    per_sample = vmap(grad(lambda *args: error(model, *args)), in_dims=(None, 0, 0))
    exact = per_sample(parameters_of(model), xs, ys)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = per_sample(parameters_of(model), xs, ys)
    for name, value in lowered.items():
        assert value.dtype == torch.float32
        assert 0 < relative_error(value, exact[name]) < 0.1 or "c_attn.bias" in name


@needs_engine
def test_an_ensemble_equals_its_members():
    members = [engine_model() for _ in range(3)]
    xs, ys = prompt()
    parameters, buffers = stack_module_state(members)

    def predict(parameters, buffers):
        return functional_call(members[0], (parameters, buffers), (xs, ys))

    alone = torch.stack([member(xs, ys) for member in members])
    assert relative_error(vmap(predict)(parameters, buffers), alone) < 9 * FP32_EPS


@needs_engine
def test_functional_call_uses_the_parameters_given_on_the_engine():
    model, other, (xs, ys) = engine_model(), engine_model(), prompt()
    assert explain_backend(model, 2, 5).chosen == "cpu"
    predictions = functional_call(model, parameters_of(other), (xs, ys))
    assert torch.equal(predictions, other(xs, ys))


DIRECTIONAL = {
    "jvp": lambda f, xs, v: jvp(f, (xs,), (v,))[1],
    "linearize": lambda f, xs, v: linearize(f, xs)[1](v),
    "jacfwd": lambda f, xs, v: torch.einsum("...bnd,bnd->...", jacfwd(f)(xs), v),
    "jacrev": lambda f, xs, v: torch.einsum("...bnd,bnd->...", jacrev(f)(xs), v),
}


@pytest.mark.parametrize("derivative", DIRECTIONAL.values(), ids=DIRECTIONAL.keys())
def test_directional_derivatives_equal_finite_differences(derivative):
    """They need neither another backend nor another attention to be set."""
    model, (xs, ys) = small_model(torch.float64), prompt(dtype=torch.float64)
    direction, step = torch.randn_like(xs), 1e-5

    def predict(xs):
        return model(xs, ys, n_loops=3, window=3)

    with torch.no_grad():
        ends = [predict(xs + sign * step * direction) for sign in (1, -1)]
    numeric = (ends[0] - ends[1]) / (2 * step)
    found = derivative(predict, xs, direction)
    torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("derivative", ["jvp", "linearize", "jacfwd"])
def test_forward_derivatives_stop_where_the_window_starts_as_gradients_do(derivative):
    model, (xs, ys) = small_model(torch.float64), prompt(dtype=torch.float64)
    direction = torch.randn_like(xs)

    def predict(xs):
        return model(xs, ys, n_loops=4, window=2)

    found = DIRECTIONAL[derivative](predict, xs, direction)
    torch.testing.assert_close(found, DIRECTIONAL["jacrev"](predict, xs, direction))


@needs_engine
@pytest.mark.parametrize("loss", ["forward", "loss"])
def test_float32_models_have_the_derivatives_of_float64_ones(loss):
    model, (xs, ys) = engine_model(), prompt()
    exact = engine_model(torch.float64)
    exact.load_state_dict(model.state_dict())

    def value(model, dtype):
        def f(xs):
            return model.loss(xs, ys.to(dtype)) if loss == "loss" else model(xs, ys.to(dtype)).sum()

        return f

    for derivative in (grad, hessian, lambda f: lambda xs: vjp(f, xs)[1](torch.ones(()).to(xs))[0]):
        truth = derivative(value(exact, torch.float64))(xs.double())
        found = derivative(value(model, torch.float32))(xs)
        assert found.dtype == torch.float32
        assert relative_error(found, truth) < 64 * FP32_EPS


def test_a_hessian_is_the_gradient_of_the_gradient():
    model, (xs, ys) = small_model(torch.float64), prompt(dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        total = model(xs.requires_grad_(), ys).sum()
        (first,) = torch.autograd.grad(total, xs, create_graph=True)
        rows = [torch.autograd.grad(g, xs, retain_graph=True)[0] for g in first.flatten()]
    expected = torch.stack(rows).view(*xs.shape, *xs.shape)
    torch.testing.assert_close(hessian(lambda xs: model(xs, ys).sum())(xs.detach()), expected)


@pytest.mark.parametrize("name", ["xs", "ys"])
def test_values_that_are_not_finite_are_refused_inside_transforms_too(name):
    model, (xs, ys) = small_model(), prompt(B=3)
    (xs if name == "xs" else ys)[1, 2] = torch.nan
    with pytest.raises(ValueError, match=re.escape(f"{name}[1, 0, 2")):  # sample 1 of B = 1
        vmap(lambda x, y: model(x[None], y[None]))(xs, ys)
    with pytest.raises(ValueError, match="prompts must be finite"):
        grad(lambda xs: model(xs, ys).sum())(xs)
    with pytest.raises(ValueError, match="prompts must be finite"):
        vmap(grad(lambda x, y: model.loss(x[None], y[None])))(xs, ys)


@needs_engine
def test_a_backend_that_is_forced_inside_a_transform_says_why_it_can_not_run():
    model, (xs, ys) = engine_model(), prompt()
    model.backend = "cpu"
    with pytest.raises(ValueError, match=r"can't run this: inside a torch\.func transform"):
        vmap(lambda x, y: model(x[None], y[None]))(xs, ys)


def test_a_transform_leaves_the_choice_of_later_calls_alone():
    model, (xs, ys) = engine_model(), prompt()
    before = model(xs, ys)
    vmap(lambda x, y: model(x[None], y[None]))(xs, ys)
    assert torch.equal(model(xs, ys), before)


TRANSFORMED = {
    "vmap": lambda model, xs, ys: vmap(lambda x, y: model(x[None], y[None]))(xs, ys),
    "vmap of the loss": lambda model, xs, ys: vmap(lambda x, y: model.loss(x[None], y[None]))(
        xs, ys
    ),
    "grad": lambda model, xs, ys: grad(lambda xs: model(xs, ys).square().sum())(xs),
    "per sample": lambda model, xs, ys: vmap(grad(lambda x, y: model.loss(x[None], y[None])))(
        xs, ys
    ),
}


@needs_engine
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED.keys())
def test_a_transform_inside_torch_compile_has_the_same_numbers(transformed):
    torch._dynamo.reset()
    model, (xs, ys) = engine_model(n_loops=2), prompt()
    compiled = torch.compile(
        lambda xs, ys: transformed(model, xs, ys), backend="aot_eager", fullgraph=True
    )
    assert relative_error(compiled(xs, ys), transformed(model, xs, ys)) < 9 * FP32_EPS
