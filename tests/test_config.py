from __future__ import annotations

import dataclasses

import pytest

from looped_fast import ModelConfig
from looped_fast.config import INJECTIONS, PRED_TYPES, check_window
from looped_fast.errors import unknown_name


def test_the_defaults_are_the_papers():
    config = ModelConfig()
    sizes = config.n_dims, config.n_positions, config.n_embd, config.n_layer, config.n_head
    assert sizes == (20, 101, 256, 1, 8)
    assert (config.n_loops, config.window, config.injection) == (30, 15, "add")
    assert config.head_dim == 32


@pytest.mark.parametrize(("pred_type", "width"), [("regression", 1), ("classification", 2)])
def test_the_readout_width_follows_the_prediction_type(pred_type, width):
    assert ModelConfig(pred_type=pred_type).n_outputs == width


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("pred_type", PRED_TYPES)
def test_a_config_survives_its_dict(injection, pred_type):
    config = ModelConfig(n_dims=7, n_layer=2, injection=injection, pred_type=pred_type)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("n_loops", "window"), [(1, 1), (10, 10), (15, 15), (16, 15), (70, 15)])
def test_a_window_that_nobody_gives_fits_the_loops(n_loops, window):
    config = ModelConfig(n_loops=n_loops)
    assert config.window == window
    assert ModelConfig.from_dict({"n_loops": n_loops}) == config
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config == ModelConfig(n_loops=n_loops, window=window)


def test_a_given_window_that_exceeds_the_loops_is_refused():
    with pytest.raises(ValueError, match=r"window = 15 is outside 1\.\.10 \(n_loops\); lower"):
        ModelConfig(n_loops=10, window=15)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_loops = 3


def test_an_unknown_model_setting_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown model setting 'n_heads'; did you mean 'n_head'"):
        ModelConfig.from_dict({"n_heads": 4})


@pytest.mark.parametrize(
    "name", ["n_dims", "n_positions", "n_embd", "n_layer", "n_head", "n_loops", "window"]
)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", None])
def test_a_size_that_is_no_positive_whole_number_is_refused(name, value):
    if (name, value) == ("window", None):
        pytest.skip("None leaves the window to the loops")
    with pytest.raises(ValueError, match=f"{name} = {value!r}: a whole number of at least 1"):
        ModelConfig(**{name: value})


def test_an_embedding_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"n_embd = 30 .* n_head = 8; choose n_embd as a multiple"):
        ModelConfig(n_embd=30, n_head=8)


def test_a_window_beyond_the_loops_is_refused():
    with pytest.raises(ValueError, match=r"window = 5 is outside 1\.\.4 .*; lower window or raise"):
        ModelConfig(n_loops=4, window=5)


@pytest.mark.parametrize(
    ("field", "wrong", "nearest"),
    [("injection", "ad", "add"), ("pred_type", "clasification", "classification")],
)
def test_an_unknown_choice_is_named_with_the_nearest(field, wrong, nearest):
    with pytest.raises(ValueError, match=f"unknown {field} '{wrong}'; did you mean '{nearest}'"):
        ModelConfig(**{field: wrong})


@pytest.mark.parametrize(("n_loops", "window"), [(1, 1), (5, 1), (5, 5)])
def test_a_window_within_the_loops_is_accepted(n_loops, window):
    check_window(n_loops, window)


@pytest.mark.parametrize(
    ("n_loops", "window", "message"),
    [
        (0, 1, "n_loops = 0: at least 1"),
        (-2, 1, "n_loops = -2"),
        (3, 0, r"window = 0 is outside 1\.\.3"),
        (3, 4, r"window = 4 is outside 1\.\.3"),
    ],
)
def test_a_window_outside_the_loops_says_the_limits(n_loops, window, message):
    with pytest.raises(ValueError, match=message):
        check_window(n_loops, window)


def test_a_name_like_no_other_gets_no_suggestion():
    message = str(unknown_name("task", "qqqq", ["lr", "dt"]))
    assert message == "unknown task 'qqqq'. Valid: lr, dt"
