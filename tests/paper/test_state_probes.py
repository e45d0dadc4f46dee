"""Probes for X^T y and w_OLS against the official formulation, one module at a time."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import FP32_EPS, relative_error, small_model
from torch import nn

from looped_fast import LoopedTransformer
from looped_fast.paper import state_probes
from looped_fast.paper.state_probes import Settings, StateProbes, hidden_states, probe
from looped_fast.pretrained.runs import Run
from looped_fast.training import checkpoint
from looped_fast.training.config import config_from_dict
from looped_fast.training.presets import preset_config

QUICK = Settings(steps=2, batch_size=4, test_prompts=8)


def make_run(**changes):
    size = {"n_embd": 32, "n_head": 2, "n_points": 7, "n_positions": 7, "n_loops": 3, "window": 2}
    config = config_from_dict({**size, **changes}, preset_config("tiny"))
    model = LoopedTransformer(config.model_config())
    return Run("a run", Path(), "0" * 64, 0, config, config.make_task(), model)


def test_batched_probes_are_the_modules_of_the_official_code():
    L, K, B, S, D, d = 3, 4, 5, 6, 16, 2
    probes, states = StateProbes(L, K, S, D, d), torch.randn(L, B, S, D)
    predictions = probes(states)
    assert predictions.shape == (L, K, B, d)
    for i in range(L):
        for k in range(K):
            module = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, d))
            n = i * K + k
            with torch.no_grad():
                module[0].weight.copy_(probes.weight_1[n].T)
                module[0].bias.copy_(probes.bias_1[n, 0])
                module[2].weight.copy_(probes.weight_2[n].T)
                module[2].bias.copy_(probes.bias_2[n, 0])
            weights = probes.token_logits[i, k].softmax(0)[None, :, None]
            expected = module((states[i] * weights).sum(1))
            assert relative_error(predictions[i, k], expected) < 16 * FP32_EPS


def test_initial_weights_have_the_spread_of_linear_layers():
    probes, linear = StateProbes(50, 4, 6, 128, 2), nn.Linear(128, 64)
    for ours, theirs in ((probes.weight_1, linear.weight), (probes.bias_1, linear.bias)):
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.3)
        assert ours.abs().max() <= 128**-0.5


@pytest.mark.parametrize("injection", ["add", "mul", "none", "every_block"])
def test_hidden_states_are_those_that_the_prediction_is_read_from(injection):
    model = small_model(torch.float64, n_layer=2, injection=injection)
    xs, ys = torch.randn(2, 5, 3).double(), torch.randn(2, 5).double()
    states = hidden_states(model, xs, ys, n_loops=3)
    assert states.shape == (1 + 3 * 2, 2, 10, 16)
    final = model._backbone.transformer["ln_f"](states[2::2])  # after each loop step
    predictions = model._read_out(final)[:, :, ::2, 0]
    expected = model(xs, ys, 3, 3)
    assert relative_error(predictions, expected) < 1e3 * torch.finfo(torch.float64).eps


def test_targets_are_of_growing_prefixes():
    xs, ys = torch.randn(2, 7, 3), torch.randn(2, 7)
    gradients = state_probes.gradient_targets(xs, ys)
    weights = state_probes.least_squares_targets(xs, ys)
    assert (gradients.shape, weights.shape) == ((7, 2, 3), (3, 2, 3))
    for i in range(1, 8):
        X, y = xs[1, :i].double(), ys[1, :i].double()
        assert relative_error(gradients[i - 1, 1], X.T @ y / 7) < 16 * FP32_EPS
        if i <= 3:
            assert relative_error(weights[i - 1, 1], torch.linalg.pinv(X) @ y) < 16 * FP32_EPS


def test_an_untrained_probe_knows_nothing_and_training_it_helps():
    run = make_run()
    before, after = (
        probe(run, dataclasses.replace(QUICK, steps=n, batch_size=32, lr=1e-2, test_prompts=256))
        for n in (1, 150)
    )
    for target in state_probes.TARGETS:
        assert len(after[target]["relative"]) == 1 + 3
        assert min(before[target]["relative"]) > 0.9
        assert after[target]["relative"][0] < before[target]["relative"][0] - 0.05


def test_a_probe_of_what_is_in_the_state_finds_it(monkeypatch):
    def telling(model, xs, ys, n_loops):
        answer = state_probes.gradient_targets(xs, ys)[-1]  # [B, d]
        shown = torch.zeros(1, len(xs), 2 * xs.shape[1], 32)
        shown[0, :, :, :5] = answer[:, None]
        return shown

    monkeypatch.setattr(state_probes, "hidden_states", telling)
    monkeypatch.setitem(
        state_probes.TARGETS, "X^T y", lambda xs, ys: state_probes.gradient_targets(xs, ys)[-1:]
    )
    settings = dataclasses.replace(QUICK, steps=150, batch_size=32, lr=2e-2, test_prompts=256)
    run = make_run()
    found = probe(run, settings)["X^T y"]["relative"][0]
    assert found < 0.05
    # With w all ones the probe is trained on positive targets, and tested on any sign.
    assert probe(run, settings, control=True)["X^T y"]["relative"][0] > 2 * found


def test_probing_is_a_function_of_the_seed():
    run = make_run()
    first, again = probe(run, QUICK), probe(run, QUICK)
    assert first == again
    assert probe(run, dataclasses.replace(QUICK, seed=1)) != first


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        (make_run(task="sparse_lr"), QUICK, "task 'lr'"),
        (make_run(), dataclasses.replace(QUICK, n_points=4), "at least 5 points"),
        (make_run(), dataclasses.replace(QUICK, n_points=8), "n_positions = 7"),
        (make_run(), dataclasses.replace(QUICK, steps=0), "steps = 0"),
        (make_run(), dataclasses.replace(QUICK, batch_size=0), "batch_size = 0: at least 1"),
        (make_run(), dataclasses.replace(QUICK, test_prompts=0), "test_prompts = 0: at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_probed_is_named(run, settings, message):
    with pytest.raises(ValueError, match=message):
        probe(run, settings)


def test_the_command_writes_numbers_and_a_figure(tmp_path, capsys):
    run = make_run()
    optimizer = torch.optim.Adam(run.model.parameters())
    checkpoint.save(tmp_path / "mine", 5, run.model, optimizer, config=run.config.to_dict())
    line = ["--steps", "2", "--batch-size", "4", "--test-prompts", "8", "--out"]
    out = tmp_path / "probes"
    assert state_probes.main([str(tmp_path / "mine"), *line, str(out)]) == 0
    result = json.loads((out / "probes.json").read_text())["runs"]["mine"]
    assert len(result["sha256"]) == 64
    assert len(result["control"]["w_OLS"]["mse"]) == 4
    assert (out / "probes.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "w_OLS" in printed
    assert f"\nplot: {out / 'probes.png'}\n" in printed
    assert state_probes.main([str(tmp_path / "none"), *line, str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["n_points", "n_loops", "steps", "batch_size", "test_prompts"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_1_is_refused_not_taken_for_the_default(name, value):
    with pytest.raises(ValueError, match=rf"{name} = {value}: at least 1 is needed"):
        probe(make_run(), Settings(**{name: value}))
