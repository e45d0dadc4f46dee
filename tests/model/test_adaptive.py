"""``predict`` with a tolerance: prompts stop one by one, as criteria say; Anderson acceleration."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_engine, prompt, small_model

from looped_fast import from_pretrained
from looped_fast.model import adaptive
from looped_fast.model.adaptive import (
    Anderson,
    Snapshot,
    kl_divergence,
    prediction_change,
    run_until,
    state_change,
)
from looped_fast.ops import cpu_engine, op
from looped_fast.tasks import make_task, sample_batch

ENGINE = {"n_embd": 32, "n_head": 4, "n_loops": 40, "window": 1}


def by_hand(model, xs, ys, tolerance, max_loops, change):
    """Stop each prompt by itself, from the states of a whole run."""
    with torch.no_grad():
        states = model.states(xs, ys, max_loops)  # [b, B, S, D]
        predictions = model.read_out(states)  # [b, B, n, ...]
    results = []
    for i in range(len(xs)):
        for step in range(1, max_loops):
            if change(predictions[:, i], states[:, i], step) < tolerance:
                break
        results.append((predictions[step, i], step + 1))
    return torch.stack([p for p, _ in results]), [n for _, n in results]


def of_predictions(predictions, states, step):
    return (predictions[step] - predictions[step - 1]).abs().max()


def of_state(predictions, states, step):
    return (states[step] - states[step - 1]).norm() / states[step].norm()


def of_classes(predictions, states, step):
    p, q = predictions[step - 1].softmax(-1), predictions[step].softmax(-1)
    return (p * (p / q).log()).sum(-1).max()


CRITERIA = {
    "prediction": (prediction_change, of_predictions, {}),
    "state": (state_change, of_state, {}),
    "KL": (kl_divergence, of_classes, {"pred_type": "classification"}),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("hooked", [False, True])
def test_each_prompt_stops_by_itself(name, hooked):
    criterion, change, changes = CRITERIA[name]
    model = small_model(dtype=torch.float64, n_loops=40, **changes)
    if hooked:
        model._read_out.register_forward_hook(lambda module, args, output: output)
    xs, ys = prompt(B=6, dtype=torch.float64)
    for tolerance in (1e-1, 1e-3, 1e-5):
        expected, steps = by_hand(model, xs, ys, tolerance, 40, change)
        found = model.predict(xs, ys, tolerance=tolerance, criterion=criterion)
        assert found.n_loops.tolist() == steps
        torch.testing.assert_close(found.predictions, expected, rtol=1e-9, atol=1e-9)
    assert len(set(steps)) > 1  # otherwise they did not stop one by one


@needs_engine
@pytest.mark.parametrize("B", [1, 3, 40])  # a team's item, items of threads, several to an item
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("pred_type", ["regression", "classification"])
def test_the_engine_stops_where_steps_one_by_one_stop(B, queries, pred_type, two_threads):
    model = small_model(**ENGINE, pred_type=pred_type)
    xs, ys = prompt(B=B)
    query = torch.randn(B, 4, 3) if queries else None
    for tolerance in (1e-1, 1e-3):
        on_engine = model.predict(xs, ys, query, tolerance=tolerance)
        assert on_engine.n_loops.dtype == torch.int64
        for i in range(B):  # each has the bits of a run of so many loops
            own = None if query is None else query[i : i + 1]
            n_loops = int(on_engine.n_loops[i])
            loop = model.predict(xs[i : i + 1], ys[i : i + 1], own, n_loops=n_loops, window=2)
            torch.testing.assert_close(on_engine.predictions[i], loop[1, 0], rtol=1e-5, atol=1e-5)
            moved = (loop[1] - loop[0]).abs().max()
            assert n_loops == 40 or moved < tolerance + 1e-5
            if n_loops > 2:
                before = model.predict(
                    xs[i : i + 1], ys[i : i + 1], own, n_loops=n_loops - 1, window=2
                )
                assert (before[1] - before[0]).abs().max() >= tolerance - 1e-5


@needs_engine
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_engine_s_steps_do_not_depend_on_threads_or_batch(precision, two_threads):
    if reason := cpu_engine.unsupported_precision(precision):
        pytest.skip(reason)
    model, (xs, ys) = small_model(**ENGINE), prompt(B=17)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        together = model.predict(xs, ys, tolerance=1e-2)
        torch.set_num_threads(1)
        for B in (1, 5, 17):
            alone = model.predict(xs[:B], ys[:B], tolerance=1e-2)
            assert torch.equal(alone.predictions, together.predictions[:B])
            assert torch.equal(alone.n_loops, together.n_loops[:B])


@needs_engine
def test_the_engine_stops_by_itself(monkeypatch):
    def one_by_one(*_, **__):
        raise AssertionError("steps ran one by one")

    model, (xs, ys) = small_model(**ENGINE), prompt()
    monkeypatch.setattr("looped_fast.model.prediction.run_until", one_by_one)
    assert model.predict(xs, ys, tolerance=1e-2).n_loops.shape == (2,)
    for option in ({"criterion": state_change}, {"anderson": 2}):
        with pytest.raises(AssertionError, match="one by one"):
            model.predict(xs, ys, tolerance=1e-2, **option)


def test_the_reference_runs_steps_one_by_one():
    model, (xs, ys) = small_model(), prompt()
    model.backend = "reference"
    arguments = model._loop_arguments(model.embed(xs, ys), None, 3, 1, "add")
    with torch.no_grad():
        assert op.run_until(*arguments, 0.1) is None


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_engine)])
def test_limits_of_tolerance_and_loops(backend):
    model, (xs, ys) = small_model(n_embd=32, n_head=4), prompt()
    model.backend = backend
    predictions, n_loops = model.predict(xs, ys, tolerance=0, max_loops=7)
    assert n_loops.tolist() == [7, 7]
    torch.testing.assert_close(predictions, model.predict(xs, ys, n_loops=7), rtol=1e-5, atol=1e-5)
    assert model.predict(xs, ys, tolerance=0).n_loops.tolist() == [4, 4]  # config.n_loops
    assert model.predict(xs, ys, tolerance=1e9).n_loops.tolist() == [2, 2]  # two are compared
    assert model.predict(xs, ys, tolerance=1e9, max_loops=1).n_loops.tolist() == [1, 1]


def test_a_prompt_of_another_batch_does_not_change_when_one_stops():
    model = small_model(dtype=torch.float64, n_loops=40)
    xs, ys = prompt(B=5, dtype=torch.float64)
    together = model.predict(xs, ys, tolerance=1e-4, anderson=3)
    for i in range(5):
        alone = model.predict(xs[i : i + 1], ys[i : i + 1], tolerance=1e-4, anderson=3)
        assert alone.n_loops[0] == together.n_loops[i]
        torch.testing.assert_close(
            alone.predictions[0], together.predictions[i], rtol=1e-8, atol=1e-8
        )


def linear(B=3, size=6, spectral_radius=0.95):
    """A linear contraction z -> A z + e for each of B prompts, and its fixed points."""
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    eigenvalues = torch.linspace(-0.5, spectral_radius, size, dtype=torch.float64)
    A = rotation @ eigenvalues.diag() @ rotation.T
    e = torch.randn(B, size, 1, dtype=torch.float64)
    return A, e, torch.linalg.solve(torch.eye(size, dtype=torch.float64) - A, e)


def run_linear(anderson, max_loops, tolerance=None):
    A, e, fixed_point = linear()
    outputs, n_loops = run_until(
        lambda z, e: A @ z + e,
        lambda z: z,
        e,
        torch.zeros_like(e),
        max_loops=max_loops,
        tolerance=tolerance,
        criterion=prediction_change,
        anderson=anderson,
    )
    return (outputs - fixed_point).norm() / fixed_point.norm(), n_loops


def test_anderson_solves_a_linear_problem_in_as_many_steps_as_it_has_unknowns():
    """Where depth is at least the size, it is GMRES but for its ridge (Walker and Ni 2011)."""
    error, _ = run_linear(anderson=6, max_loops=9)
    plain, _ = run_linear(anderson=0, max_loops=9)
    assert error < 1e-3
    assert plain > 0.2


def test_depth_one_is_the_secant_method():
    A, e, _ = linear(B=1)
    mixer, z = Anderson(1), torch.zeros_like(e)
    stepped = A @ z + e
    z_1 = mixer.mix(z, stepped)
    assert torch.equal(z_1, stepped)  # one step alone: plain iteration
    stepped_1 = A @ z_1 + e
    g_0, g_1 = stepped - z, stepped_1 - z_1
    share = (g_1 * (g_1 - g_0)).sum() / (g_1 - g_0).square().sum()
    expected = (1 - share) * stepped_1 + share * stepped
    torch.testing.assert_close(mixer.mix(z_1, stepped_1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [3, 5])
def test_anderson_reaches_the_fixed_point_of_a_trained_model_in_fewer_steps(depth):
    model = from_pretrained("lr-small")
    xs, ys = sample_batch(make_task("lr", 5), 32, 16, seed=5, step=0)
    fixed_point = model.predict(xs, ys, n_loops=500)
    plain = model.predict(xs, ys, tolerance=1e-4, max_loops=500)
    fast = model.predict(xs, ys, tolerance=1e-4, max_loops=500, anderson=depth)
    assert fast.n_loops.float().mean() < 0.25 * plain.n_loops.float().mean()
    error = (fast.predictions - fixed_point)[:, -1].abs().median()  # after all examples
    assert error < 0.005 * ys.std()


def test_anderson_without_a_tolerance_runs_all_steps():
    model, (xs, ys) = small_model(dtype=torch.float64), prompt(dtype=torch.float64)
    found = model.predict(xs, ys, n_loops=60, anderson=3)
    fixed_point = model.predict(xs, ys, n_loops=400)
    torch.testing.assert_close(found, fixed_point, rtol=1e-5, atol=1e-5)


def test_a_residual_of_zero_is_a_fixed_point_for_anderson():
    z = torch.randn(2, 3, 4)
    mixer = Anderson(2)
    for _ in range(4):
        assert torch.allclose(mixer.mix(z, z), z)


def test_an_own_criterion_is_called_with_both_snapshots():
    calls = []

    def after_three(now, before):
        assert isinstance(now, Snapshot)
        assert now.state.shape == before.state.shape
        calls.append(now.outputs.shape)
        return torch.full((len(now.state),), 1.0 if len(calls) < 2 else 0.0)

    model, (xs, ys) = small_model(), prompt()
    assert model.predict(xs, ys, tolerance=0.5, criterion=after_three).n_loops.tolist() == [3, 3]
    assert calls == [(2, 5, 1)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, "tolerance = -1.0: at least 0"),
        ({"tolerance": float("nan")}, "tolerance = nan"),
        ({"tolerance": 0.1, "n_loops": 5}, "give max_loops = 5"),
        ({"tolerance": 0.1, "window": 2}, "window = 2 does not go with a tolerance"),
        ({"anderson": 2, "window": 2}, "window = 2 does not go with"),
        ({"max_loops": 5}, "give a tolerance"),
        ({"tolerance": 0.1, "max_loops": 0}, "n_loops = 0"),
        ({"anderson": -1}, "anderson = -1"),
        ({"tolerance": 0.1, "criterion": kl_divergence}, "predicts numbers"),
        ({"tolerance": 0.1, "criterion": lambda now, before: now.outputs}, "a number for each"),
    ],
)
def test_bad_options_are_refused(options, message):
    model, (xs, ys) = small_model(), prompt()
    with pytest.raises(ValueError, match=message):
        model.predict(xs, ys, **options)


def test_queries_with_a_tolerance_are_refused_where_modules_are_hooked():
    model, (xs, ys) = small_model(), prompt()
    model._read_out.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="_read_out has a forward_hook; leave out the option"):
        model.predict(xs, ys, torch.zeros(2, 3, 3), tolerance=0.1)


def test_the_criteria_are_public():
    assert {"prediction_change", "state_change", "kl_divergence"} <= set(vars(adaptive))
