"""``predict`` with queries: each is predicted as if it alone followed the examples that it sees."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import needs_engine, prompt, relative_error, small_model

from looped_fast import LoopedTransformer, ModelConfig
from looped_fast.compat import build_model
from looped_fast.evaluation import model_predictor
from looped_fast.evaluation.shifts import sample_shifted
from looped_fast.model import prediction
from looped_fast.ops import cpu_engine
from looped_fast.tasks import make_task

ON_ENGINE = {"n_embd": 32, "n_head": 4}
MODELS = {
    "looped": ON_ENGINE,
    "multiplied, two blocks": {**ON_ENGINE, "injection": "mul", "n_layer": 2},
    "tied": {**ON_ENGINE, "injection": "none"},
    "standard": {"n_layer": 3, "n_loops": 1, "window": 1, "injection": "every_block"},
    "classification": {**ON_ENGINE, "pred_type": "classification"},
    "too narrow for the engine": {},
}


def one_prompt_each(model, xs, ys, queries, seen, **loops):
    """Predictions of the last point of a prompt for each query: [W, B, m, ...]."""
    columns = []
    for i, n in enumerate(seen):
        points = torch.cat((xs[:, :n], queries[:, i : i + 1]), 1)
        ys_and_any = torch.cat((ys[:, :n], ys.new_full((len(ys), 1), 7.0)), 1)
        columns.append(model(points, ys_and_any, **loops)[:, :, -1])
    return torch.stack(columns, 2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("hooked", [False, True])
def test_queries_are_predicted_as_one_prompt_each(name, hooked):
    model = small_model(dtype=torch.float64, **MODELS[name])
    if hooked:  # which runs module by module
        model._read_out.register_forward_hook(lambda module, args, output: 2 * output)
    xs, ys = prompt(dtype=torch.float64)
    queries = torch.randn(2, 6, 3, dtype=torch.float64)
    window = min(2, model.config.n_loops)
    found = model.predict(xs, ys, queries, window=window)
    expected = one_prompt_each(model, xs, ys, queries, [5] * 6, window=window)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.predict(xs, ys, queries), found[-1], rtol=0, atol=1e-12)
    seen = torch.tensor([5, 0, 3, 3, 1, 4])
    found = model.predict(xs, ys, queries, seen=seen)
    expected = one_prompt_each(model, xs, ys, queries, seen.tolist(), window=1)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not found.requires_grad


@pytest.mark.parametrize("family", ["gpt2_loop", "gpt2", "gpt2_tying"])
def test_official_models_predict_queries(family):
    class Conf:
        n_dims, n_positions, n_embd, n_layer, n_head = 3, 8, 16, 2, 2

    Conf.family = family
    model = build_model(Conf).double()
    xs, ys = prompt(dtype=torch.float64)
    queries = torch.randn(2, 4, 3, dtype=torch.float64)
    found = model.predict(xs, ys, queries, n_loops=2 if family == "gpt2_loop" else None)
    for i in range(4):
        points = torch.cat((xs, queries[:, i : i + 1]), 1)
        arguments = (0, 2) if family == "gpt2_loop" else (False,)
        alone = model(points, torch.cat((ys, ys[:, :1]), 1), *arguments)
        alone = alone[-1] if family == "gpt2_loop" else alone
        torch.testing.assert_close(found[:, i], alone[:, -1], rtol=1e-10, atol=1e-10)


def test_without_queries_it_predicts_at_every_position():
    model, (xs, ys) = small_model(), prompt()
    with torch.no_grad():
        assert torch.equal(model.predict(xs, ys), model(xs, ys)[-1])
        assert torch.equal(model.predict(xs, ys, n_loops=3, window=3), model(xs, ys, 3, 3))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_none_to_the_most_examples_are_possible(n):
    model = small_model(dtype=torch.float64)
    xs, ys = prompt(n=n, dtype=torch.float64)
    queries = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = one_prompt_each(model, xs, ys, queries, [n] * 4, window=1)[0]
    torch.testing.assert_close(model.predict(xs, ys, queries), expected, rtol=1e-10, atol=1e-10)
    assert model.predict(xs, ys, queries[:, :0]).shape == (2, 0)


def test_a_hook_sees_each_query_s_prompt_once():
    model, calls = small_model(), []
    model._read_in.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    xs, ys = prompt()
    with pytest.warns(UserWarning, match="_read_in has a forward_hook"):
        model.predict(xs, ys, torch.randn(2, 3, 3))
    assert calls == [(2, 12, 3)] * 3


def test_many_queries_go_in_parts(monkeypatch):
    model, (xs, ys) = small_model(dtype=torch.float64), prompt(dtype=torch.float64)
    queries, seen = torch.randn(2, 23, 3, dtype=torch.float64), torch.arange(23) % 6
    whole = model.predict(xs, ys, queries, seen=seen, window=2)
    monkeypatch.setattr(prediction, "_MOST_BYTES", 0)
    monkeypatch.setattr(prediction, "_LEAST_QUERIES", 5)
    in_parts = model.predict(xs, ys, queries, seen=seen, window=2)
    torch.testing.assert_close(in_parts, whole, rtol=1e-12, atol=1e-12)


@needs_engine
@pytest.mark.parametrize("amp", [False, True])
def test_the_engine_agrees_within_rounding(amp):
    if amp and cpu_engine.unsupported_precision("bf16"):
        pytest.skip("no bf16 here")
    config = ModelConfig(n_dims=5, n_positions=41, n_embd=64, n_head=4, n_loops=12)
    model = LoopedTransformer(config)
    xs, ys, queries = torch.randn(3, 40, 5), torch.randn(3, 40), torch.randn(3, 30, 5)
    truth = one_prompt_each(
        model.double(), xs.double(), ys.double(), queries.double(), [40] * 30, window=1
    )[0]
    model.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp), torch.no_grad():
        shared = model.predict(xs, ys, queries)
        alone = one_prompt_each(model, xs, ys, queries, [40] * 30, window=1)[0]
    # Twice the error of one prompt each, which the engine's own tests hold to plain PyTorch's.
    assert relative_error(shared, truth) <= 2 * relative_error(alone, truth) + 1e-6


@needs_engine
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_thousand_queries_are_ten_times_faster_than_as_many_prompts(backend):
    config = ModelConfig(n_dims=5, n_positions=41, n_embd=64, n_head=4, n_loops=2, window=1)
    model = LoopedTransformer(config, backend)
    xs, ys, queries = torch.randn(1, 40, 5), torch.randn(1, 40), torch.randn(1, 1000, 5)
    points = torch.cat((xs.expand(1000, -1, -1), queries[0, :, None]), 1)
    values = torch.cat((ys.expand(1000, -1), torch.zeros(1000, 1)), 1)

    def seconds(predict, times_run):
        times = []
        for _ in range(times_run):
            started = time.perf_counter()
            result = predict()
            times.append(time.perf_counter() - started)
        return min(times), result

    shared, predictions = seconds(lambda: model.predict(xs, ys, queries)[0], 3)
    each, expected = seconds(lambda: model.predict(points, values)[:, -1], 1)
    torch.testing.assert_close(predictions, expected, rtol=1e-4, atol=1e-5)
    assert each > 10 * shared  # docs/queries.md has 43 times and more


@pytest.mark.parametrize("name", ["random quadrants", "orthogonal queries", "overlapping queries"])
def test_query_shifts_are_evaluated_as_one_prompt_each(name):
    model = small_model(dtype=torch.float64, n_positions=8, n_dims=5)
    prompts = sample_shifted(name, make_task("lr", 5), 4, 5, seed=0)
    xs, ys, queries, _ = (t if t is None else t.double() for t in prompts)
    found = model_predictor(model, 3)(xs, ys, queries)
    expected = one_prompt_each(model, xs, ys, queries, range(5), n_loops=3, window=1)[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)


def test_it_can_be_called_in_inference_mode():
    model, (xs, ys) = small_model(**ON_ENGINE), prompt()
    queries = torch.randn(2, 4, 3)
    expected = model.predict(xs, ys, queries)
    with torch.inference_mode():
        assert torch.equal(model.predict(xs.clone(), ys.clone(), queries.clone()), expected)


def test_a_device_without_a_fast_backend_is_said_once():
    prediction._say_once_that_nothing_shares.cache_clear()
    model, (xs, ys) = small_model().to("meta"), prompt()
    arguments = xs.to("meta"), ys.to("meta"), torch.empty(2, 4, 3, device="meta")
    with pytest.warns(UserWarning, match="plain PyTorch") as said:
        shapes = [model.predict(*arguments).shape for _ in range(2)]
    assert shapes == [(2, 4)] * 2
    assert [warning.filename for warning in said] == [__file__]


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"queries": [[0.0] * 3]}, TypeError, "queries is a list"),
        ({"queries": torch.zeros(2, 3)}, ValueError, r"\[2, m, 3\] is needed"),
        ({"queries": torch.zeros(2, 4, 2)}, ValueError, r"\[2, m, 3\] is needed"),
        ({"queries": torch.zeros(1, 4, 3)}, ValueError, r"\[2, m, 3\] is needed"),
        ({"queries": torch.zeros(2, 4, 3).double()}, ValueError, "queries is torch.float64"),
        ({"queries": torch.full((2, 4, 3), NAN)}, ValueError, r"queries\[0, 0, 0\] is nan"),
        ({"ys": torch.full((2, 5), NAN)}, ValueError, r"ys\[0, 0\] is nan"),
        ({"xs": torch.zeros(2, 8, 3), "ys": torch.zeros(2, 8)}, ValueError, "point 9, beyond"),
        ({"seen": torch.tensor([1, 2, 3])}, ValueError, r"\[4\] int64 is needed"),
        ({"seen": [1, 2, 3, 4]}, ValueError, r"\[4\] int64 is needed"),
        ({"seen": torch.tensor([0, 1, 2, 6])}, ValueError, r"holds 0..6; 0..5 is possible"),
        ({"queries": None, "seen": torch.tensor([1])}, ValueError, "give queries, too"),
        ({"n_loops": 0}, ValueError, "n_loops = 0"),
        ({"n_loops": 2, "window": 3}, ValueError, "window = 3"),
        ({"window": 0}, ValueError, "window = 0"),
        ({"n_loops": 1.5}, TypeError, "n_loops = 1.5"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    model, (xs, ys) = small_model(), prompt()
    arguments = {"xs": xs, "ys": ys, "queries": torch.zeros(2, 4, 3), **changes}
    with pytest.raises(error, match=message):
        model.predict(**arguments)
