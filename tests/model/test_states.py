"""Looking inside: the state after each step, a single step, and predictions from states."""

from __future__ import annotations

import pytest
import torch
from conftest import naive_loop, needs_engine, needs_triton, relative_error, small_model

from looped_fast import LoopedTransformer, ModelConfig, explain_backend

CONFIG = ModelConfig(n_dims=4, n_positions=8, n_embd=64, n_head=4, n_loops=5, window=2)
BACKENDS = [
    "reference",
    "compiled",
    pytest.param("triton", marks=needs_triton),
    pytest.param("cpu", marks=needs_engine),
    "modules",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module"),
]


def build(backend="auto", **changes) -> LoopedTransformer:
    model = small_model(**{**CONFIG.to_dict(), **changes})
    if backend == "modules":
        model._backbone.transformer["h"][0].mlp.register_forward_hook(lambda *_: None)
        assert explain_backend(model, 2, 8).chosen == "reference"
    else:
        model.backend = backend
    return model


@pytest.fixture
def prompt():
    return torch.randn(2, 8, 4), torch.randn(2, 8)


def by_formulas(model, xs, ys, n_loops, window):
    """States of the window in float64, from formulas alone."""
    double = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    tokens = torch.zeros(2, 16, 4, dtype=torch.float64)
    tokens[:, ::2], tokens[:, 1::2, 0] = xs, ys
    e = tokens @ double["_read_in.weight"].T + double["_read_in.bias"]
    first = {"add": torch.zeros_like(e), "mul": torch.ones_like(e)}.get(model.config.injection, e)
    positions, *weights = (p for name, p in double.items() if name.startswith("_backbone"))
    inputs = {"embeddings": e, "positions": positions[:16], "state": first, "weights": weights}
    return naive_loop(inputs, 4, n_loops, window, model.config.injection), double


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("injection", ["add", "every_block"])
def test_states_after_each_step_on_every_backend(backend, injection, prompt):
    model = build(backend, injection=injection)
    states = model.states(*prompt, 3)
    assert states.shape == (3, 2, 16, 64)
    assert not states.requires_grad
    expected, _ = by_formulas(model, *prompt, 3, 3)
    assert relative_error(states, expected) < 1e-5


@pytest.mark.parametrize("injection", ["mul", "none"])
def test_states_start_as_the_injection_says(injection, prompt):
    model = build(injection=injection)
    expected, _ = by_formulas(model, *prompt, 3, 3)
    assert relative_error(model.states(*prompt, 3), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_carry_gradient_through_the_window_if_asked(backend, prompt):
    model = build(backend)
    states = model.states(*prompt, 3, window=2)
    assert states.shape == (3, 2, 16, 64)
    weight = torch.randn(2, 2, 16, 64)
    (states[1:] * weight).sum().backward()
    expected, double = by_formulas(model, *prompt, 3, 2)
    (expected * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("_read_out"):
            assert relative_error(parameter.grad, double[name].grad) < 1e-4, name


def test_a_window_of_all_steps_reaches_the_first():
    model = build(n_dims=4).double()
    xs, ys = torch.randn(2, 8, 4).double(), torch.randn(2, 8).double()
    states = model.states(xs, ys, 3, window=3)
    expected, double = by_formulas(model, xs, ys, 3, 3)
    torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-10)
    states[0].sum().backward()
    expected[0].sum().backward()
    name = "_read_in.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, double[name].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_one_by_one_are_the_states(backend, prompt):
    model = build(backend)
    embeddings = model.embed(*prompt)
    state = torch.zeros_like(embeddings)
    with torch.no_grad():
        for expected in model.states(*prompt, 3):
            state = model.step(state, embeddings)
            torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_differentiable_in_state_embeddings_and_parameters(backend, prompt):
    model = build(backend)
    embeddings = model.embed(*prompt).detach().requires_grad_()
    state = torch.randn(2, 16, 64, requires_grad=True)
    weight = torch.randn(2, 16, 64)
    (model.step(state, embeddings) * weight).sum().backward()
    double = build().double()
    double.load_state_dict(model.state_dict())
    double.backend = "reference"
    e, z = (t.detach().double().requires_grad_() for t in (embeddings, state))
    (double.step(z, e) * weight).sum().backward()
    assert relative_error(embeddings.grad, e.grad) < 1e-4
    assert relative_error(state.grad, z.grad) < 1e-4
    name = "_backbone.transformer.h.0.mlp.c_fc.weight"
    assert relative_error(model.get_parameter(name).grad, double.get_parameter(name).grad) < 1e-4


@pytest.mark.parametrize("pred_type", ["regression", "classification"])
@pytest.mark.parametrize("hooked", [False, True])
def test_predictions_from_states_are_those_of_a_call(pred_type, hooked, prompt):
    model = build("modules" if hooked else "auto", pred_type=pred_type)
    predictions = model.read_out(model.states(*prompt))
    assert predictions.shape[:3] == (5, 2, 8)
    torch.testing.assert_close(predictions[-2:], model(*prompt), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictions[1], model(*prompt, 2, 1)[0], rtol=1e-5, atol=1e-5)


def test_a_patched_state_runs_on_from_its_step(prompt):
    """Patch in another prompt's states: what follows is that prompt's predictions."""
    model, (xs, ys) = build(), prompt
    other = torch.randn_like(xs), torch.randn_like(ys)
    with torch.no_grad():
        state, embeddings = model.states(*other)[1], model.embed(*other)
        for _ in range(2, 5):
            state = model.step(state, embeddings)
        torch.testing.assert_close(model.read_out(state), model(*other)[-1], rtol=1e-5, atol=1e-5)


def test_states_under_autocast_stay_in_float32(prompt):
    model = build()
    exact = model.states(*prompt)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.states(*prompt)
        stepped = model.step(low[0], model.embed(*prompt))
        predictions = model.read_out(low)
    assert low.dtype == stepped.dtype == predictions.dtype == torch.float32
    assert 1e-5 < relative_error(low, exact) < 0.1
    torch.testing.assert_close(stepped, low[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n_loops", "window", "message"),
    [
        (0, 0, "n_loops = 0: at least 1"),
        (3, 4, r"window = 4 is outside 0\.\.3"),
        (3, -1, r"window = -1 is outside 0\.\.3"),
    ],
)
def test_counts_out_of_range_are_refused(n_loops, window, message, prompt):
    with pytest.raises(ValueError, match=message):
        build().states(*prompt, n_loops, window)


def test_a_state_of_another_shape_is_refused(prompt):
    model = build()
    with pytest.raises(ValueError, match=r"state has shape \(2, 15, 64\); \(2, 16, 64\) is needed"):
        model.step(torch.zeros(2, 15, 64), model.embed(*prompt))
