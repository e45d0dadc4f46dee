from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from conftest import naive_loop, prompt, relative_error, small_model

from looped_fast import LoopedTransformer, ModelConfig, explain_backend
from looped_fast.model import ambient_precision
from looped_fast.ops.reference import interleave

OFFICIAL_BLOCK = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
    "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
    "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def test_prompts_interleave_with_y_in_coordinate_zero():
    xs = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    ys = torch.tensor([[7.0, 8.0]])
    expected = [[1, 2, 3], [7, 0, 0], [4, 5, 6], [8, 0, 0]]
    assert interleave(xs, ys)[0].tolist() == expected


def test_a_prompt_of_one_coordinate_interleaves():
    assert interleave(torch.tensor([[[1.0]]]), torch.tensor([[2.0]])).tolist() == [[[1.0], [2.0]]]


@pytest.mark.parametrize("injection", ["add", "mul", "none", "every_block"])
def test_predictions_equal_the_formulas_of_the_paper(injection):
    model = small_model(torch.float64, injection=injection, n_layer=2)
    xs, ys = prompt(dtype=torch.float64)
    tokens = torch.zeros(2, 10, 3, dtype=torch.float64)
    tokens[:, ::2], tokens[:, 1::2, 0] = xs, ys
    e = tokens @ model._read_in.weight.T + model._read_in.bias
    first = {"add": torch.zeros_like(e), "mul": torch.ones_like(e)}.get(injection, e)
    state = model.state_dict()
    backbone = [v for k, v in state.items() if k.startswith("_backbone")]
    positions, *weights = backbone
    inputs = {"embeddings": e, "positions": positions[:10], "state": first, "weights": weights}
    states = naive_loop(inputs, 2, 4, 3, injection)
    expected = states[:, :, ::2] @ state["_read_out.weight"][0] + state["_read_out.bias"]
    torch.testing.assert_close(model(xs, ys, 4, 3), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("n_layer", "pred_type"), [(1, "regression"), (3, "classification")])
def test_the_state_dict_has_the_official_keys_and_shapes(n_layer, pred_type):
    state = small_model(n_layer=n_layer, pred_type=pred_type).state_dict()
    outputs = 2 if pred_type == "classification" else 1
    blocks = [f"_backbone.transformer.h.{i}.{k}" for i in range(n_layer) for k in OFFICIAL_BLOCK]
    assert list(state) == [
        "_read_in.weight",
        "_read_in.bias",
        "_backbone.transformer.wpe.weight",
        *blocks,
        "_backbone.transformer.ln_f.weight",
        "_backbone.transformer.ln_f.bias",
        "_read_out.weight",
        "_read_out.bias",
    ]
    assert state["_read_in.weight"].shape == (16, 3)
    assert state["_backbone.transformer.wpe.weight"].shape == (2 * 8 + 1, 16)
    assert state["_backbone.transformer.h.0.attn.c_attn.weight"].shape == (48, 16)
    assert state["_backbone.transformer.h.0.mlp.c_proj.weight"].shape == (16, 64)
    assert state["_read_out.weight"].shape == (outputs, 16)


@pytest.mark.parametrize(("n_layer", "millions"), [(1, 0.79), (12, 9.48)])
def test_reference_sizes_have_the_papers_number_of_parameters(n_layer, millions):
    """The paper's table of parameters has 0.79M and 9.48M, without positions."""
    model = LoopedTransformer(ModelConfig(n_layer=n_layer))
    positions = model._backbone.transformer["wpe"].weight.numel()
    count = sum(p.numel() for p in model.parameters()) - positions
    assert round(count / 1e6, 2) == pytest.approx(millions, abs=0.011)


def test_initial_weights_have_gpt2s_spread():
    model = LoopedTransformer(ModelConfig(n_layer=2))
    state = model.state_dict()
    h = "_backbone.transformer.h.1."
    for name, std in (
        (h + "attn.c_attn.weight", 0.02),
        (h + "mlp.c_fc.weight", 0.02),
        (h + "attn.c_proj.weight", 0.01),
        (h + "mlp.c_proj.weight", 0.01),
        ("_backbone.transformer.wpe.weight", 0.02),
    ):
        assert state[name].std().item() == pytest.approx(std, rel=0.02), name
    assert not state[h + "attn.c_attn.bias"].any()


@pytest.mark.parametrize("i", range(5))
def test_a_prediction_does_not_see_its_own_y_nor_later_points(i):
    model = small_model()
    xs, ys = prompt()
    before = model(xs, ys)
    xs_changed, ys_changed = xs.clone(), ys.clone()
    xs_changed[:, i + 1 :] += 1
    ys_changed[:, i:] -= 1
    after = model(xs_changed, ys_changed)
    assert torch.equal(after[..., : i + 1], before[..., : i + 1])
    if i < 4:
        assert not torch.isclose(after[..., i + 1 :], before[..., i + 1 :]).any()


def test_a_prediction_sees_its_x_and_the_y_before():
    model = small_model()
    xs, ys = prompt()
    before = model(xs, ys)
    for changed in ("xs", "ys"):
        arguments = {"xs": xs.clone(), "ys": ys.clone()}
        arguments[changed][:, 2 if changed == "xs" else 1] += 1
        assert not torch.isclose(model(**arguments)[..., 2], before[..., 2]).any(), changed


def test_prompts_of_a_batch_are_independent():
    model = small_model(torch.float64)
    xs, ys = prompt(B=4, dtype=torch.float64)
    together = model(xs, ys)
    alone = torch.cat([model(xs[i : i + 1], ys[i : i + 1]) for i in range(4)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_a_prefix_of_a_prompt_has_the_same_predictions():
    model = small_model(torch.float64)
    xs, ys = prompt(n=8, dtype=torch.float64)
    short = model(xs[:, :3], ys[:, :3])
    torch.testing.assert_close(short, model(xs, ys)[..., :3], rtol=1e-12, atol=1e-12)


def test_shapes_follow_window_and_prediction_type():
    xs, ys = prompt()
    assert small_model()(xs, ys).shape == (2, 2, 5)
    assert small_model()(xs, ys, 4, 4).shape == (4, 2, 5)
    assert small_model(pred_type="classification")(xs, ys).shape == (2, 2, 5, 2)


def test_the_window_defaults_to_the_lesser_of_setting_and_loops():
    model = small_model()
    xs, ys = prompt()
    assert model(xs, ys, 1).shape[0] == 1
    assert model(xs, ys, 3).shape[0] == 2
    assert torch.equal(model(xs, ys), model(xs, ys, 4, 2))


def test_loops_may_exceed_the_setting():
    model = small_model(torch.float64)
    xs, ys = prompt(dtype=torch.float64)
    longer = model(xs, ys, 9, 9)
    torch.testing.assert_close(longer[3], model(xs, ys, 4, 1)[0], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(longer[8], longer[3]).any()


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_ambient_autocast_is_followed(dtype, eps):
    model = small_model()
    xs, ys = prompt()
    single = model(xs, ys)
    with torch.autocast("cpu", dtype=dtype):
        low = model(xs, ys)
    assert low.dtype == torch.float32
    assert 0.01 * eps < relative_error(low, single) < 20 * eps


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (None, "fp32")]
)
def test_the_ambient_precision_has_a_name(dtype, name):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        assert ambient_precision("cpu") == name


def test_autocast_to_another_dtype_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float64)
    with pytest.raises(ValueError, match=r"autocast to torch\.float64 is not supported; use"):
        ambient_precision("cpu")


def test_bf16_training_moves_every_parameter_that_it_uses():
    model = small_model()
    xs, ys = prompt(n=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = model(xs, ys, 4, 2)
    (predictions - ys).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_double_precision_refines_single():
    double = small_model(torch.float64)
    single = copy.deepcopy(double).float()
    xs, ys = prompt(dtype=torch.float64)
    exact = double(xs, ys)
    assert exact.dtype == torch.float64
    assert relative_error(single(xs.float(), ys.float()), exact) < 1e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_the_same_numbers_and_its_own_weights(duplicate):
    model = small_model()
    xs, ys = prompt()
    before = model(xs, ys)
    other = duplicate(model)
    assert other.config == model.config
    assert torch.equal(other(xs, ys), before)
    with torch.no_grad():
        other._read_out.bias.add_(1)
    assert torch.equal(model(xs, ys), before)


def test_a_state_dict_carries_all_the_numbers():
    one, other = small_model(), small_model()
    xs, ys = prompt()
    assert not torch.equal(one(xs, ys), other(xs, ys))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(xs, ys), other(xs, ys))


@pytest.mark.parametrize(
    ("xs_shape", "ys_shape", "message"),
    [
        ((2, 9, 3), (2, 9), "9 points exceed n_positions = 8; shorten the prompt, or build"),
        ((2, 5, 4), (2, 5), "xs has shape (2, 5, 4); [B, n, 3] is needed (n_dims)"),
        ((5, 3), (5,), "xs has shape (5, 3); [B, n, 3] is needed (n_dims)"),
        ((2, 5, 3), (2, 4), "ys has shape (2, 4); (2, 5) is needed to match xs"),
        ((2, 5, 3), (2, 5, 1), "ys has shape (2, 5, 1); (2, 5) is needed to match xs"),
        ((2, 5, 3), (3, 5), "ys has shape (3, 5); (2, 5) is needed to match xs"),
    ],
)
def test_a_prompt_of_the_wrong_shape_is_refused(xs_shape, ys_shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_model()(torch.zeros(xs_shape), torch.zeros(ys_shape))


@pytest.mark.parametrize("name", ["xs", "ys"])
def test_a_prompt_of_the_wrong_dtype_or_device_is_refused(name):
    for change in ({"dtype": torch.float64}, {"device": "meta"}):
        arguments = dict(zip(("xs", "ys"), prompt(), strict=True))
        arguments[name] = arguments[name].to(**change)
        message = rf"{name} is .* the model is torch\.float32 on cpu; convert with {name}\.to\("
        with pytest.raises(ValueError, match=message):
            small_model()(**arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "index"), [("xs", (1, 2, 0)), ("ys", (0, 4))])
def test_a_value_that_is_not_finite_is_named_with_its_index(name, index, value):
    arguments = dict(zip(("xs", "ys"), prompt(), strict=True))
    arguments[name][index] = value
    message = f"{name}{list(index)} is {value}; prompts must be finite: drop or impute"
    with pytest.raises(ValueError, match=re.escape(message)):
        small_model()(**arguments)


@pytest.mark.parametrize(
    ("n_loops", "window", "message"),
    [
        (0, None, "n_loops = 0: at least 1"),
        (3, 4, r"window = 4 is outside 1\.\.3"),
        (3, 0, r"window = 0 is outside 1\.\.3"),
    ],
)
def test_loops_and_window_out_of_range_are_refused(n_loops, window, message):
    with pytest.raises(ValueError, match=message):
        small_model()(*prompt(), n_loops, window)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": "tritn"}, ValueError, "unknown backend 'tritn'; did you mean 'triton'"),
        ({"attention": "flash"}, ValueError, "unknown attention 'flash'; did you mean 'flash_att"),
        ({"cuda_graphs": "onn"}, ValueError, "unknown cuda_graphs 'onn'; did you mean 'on'"),
        ({"recompute": "state"}, TypeError, "recompute = 'state': a bool is needed"),
        ({"config": {"n_embd": 64}}, TypeError, r"config = {'n_embd': 64}: a ModelConfig is need"),
    ],
)
def test_a_setting_is_checked_where_it_is_given(settings, error, message):
    with pytest.raises(error, match=message):
        LoopedTransformer(**{"config": small_model().config, **settings})


def test_a_backend_set_later_is_checked_by_the_next_call():
    model = small_model()
    model.backend = "cpuu"
    with pytest.raises(ValueError, match="unknown backend 'cpuu'; did you mean 'cpu'"):
        model(*prompt())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, xs, ys: m(xs, ys, 2.5), r"n_loops = 2\.5: a whole number is needed"),
        (lambda m, xs, ys: m(xs, ys, "3"), "n_loops = '3': a whole number is needed"),
        (lambda m, xs, ys: m.loss(xs, ys, 3, 1.0), r"window = 1\.0: a whole number"),
        (lambda m, xs, ys: m.loss(xs, ys, n_supervised=0.5), r"n_supervised = 0\.5: a whole"),
        (lambda m, xs, ys: m.states(xs, ys, window=None), "window = None: a whole number"),
        (lambda m, xs, ys: m(xs.tolist(), ys), r"xs is a list; a torch\.Tensor is needed"),
        (lambda m, xs, ys: m.embed(xs, ys.numpy()), r"ys is a ndarray; a torch\.Tensor is"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(call, message):
    with pytest.raises(TypeError, match=message):
        call(small_model(), *prompt())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 5, "bf17"), "unknown precision 'bf17'; did you mean 'bf16'"),
        ((0, 5), "batch_size = 0: a whole number of at least 1"),
        ((2, -5), "n_points = -5: a whole number of at least 1"),
        ((2, 5.0), r"n_points = 5\.0: a whole number of at least 1"),
    ],
)
def test_explain_backend_checks_what_it_is_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain_backend(small_model(), *arguments)
