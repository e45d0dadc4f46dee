"""Meta and fake tensors, export and tracing: shapes and dtypes without values."""

import pytest
import torch
from conftest import FP32_EPS, needs_engine, prompt, relative_error, small_model
from foreign_models import Looped
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from looped_fast import LoopedTransformer, accelerate, explain_backend

SIZES = pytest.mark.parametrize(
    "changes",
    [{}, {"n_embd": 32, "n_head": 4}, {"pred_type": "classification"}],
    ids=["reference", "engine", "classification"],
)
PRECISION = pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])


def check_shapes(model, xs, ys):
    """Predictions, loss and gradients of two prompts of 5 points have their shapes and dtypes."""
    predictions = model(xs, ys)
    outputs = (2,) if model.config.pred_type == "classification" else ()
    assert (tuple(predictions.shape), predictions.dtype) == ((2, 2, 5, *outputs), torch.float32)
    assert predictions.device == xs.device
    loss = predictions.sum() if outputs else model.loss(xs, ys)
    assert (tuple(loss.shape), loss.dtype, loss.device) == ((), torch.float32, xs.device)
    loss.backward()
    for p in model.parameters():
        assert (p.grad.shape, p.grad.dtype, p.grad.device) == (p.shape, p.dtype, p.device)


@SIZES
@PRECISION
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_on_meta_has_the_shapes(changes, autocast, recompute):
    model = small_model(**changes).to("meta")
    model.recompute = recompute
    xs, ys = (tensor.to("meta") for tensor in prompt())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check_shapes(model, xs, ys)


@SIZES
def test_a_model_made_on_meta_has_the_shapes(changes):
    config = small_model(**changes).config
    with torch.device("meta"):
        check_shapes(LoopedTransformer(config), *prompt())


def test_meta_is_the_reason_against_each_fast_backend():
    selection = explain_backend(small_model(n_embd=64, n_head=4).to("meta"), 2, 5)
    assert selection.chosen == "reference"
    assert "tensors are on meta" in selection.reasons["cpu"]
    assert "tensors are on meta" in selection.reasons["triton"]
    assert "tensors are on meta" in selection.reasons["compiled"]


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_an_accelerated_model_on_meta_has_the_shapes(precision):
    xs, ys = (tensor.to("meta") for tensor in prompt(d=5))
    made_before = accelerate(Looped(), precision=precision).to("meta")
    for model in (made_before, accelerate(Looped().to("meta"), precision=precision)):
        predictions = model(xs, ys, 1, 3)
        assert [tuple(p.shape) for p in predictions] == [(2, 5)] * 2


@SIZES
@PRECISION
def test_a_model_made_of_fake_tensors_has_the_shapes(changes, autocast):
    config = small_model(**changes).config
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check_shapes(LoopedTransformer(config), *prompt())


@SIZES
@pytest.mark.parametrize("inside", [False, True])
def test_fake_prompts_of_a_real_model_have_the_shapes(changes, inside):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, (xs, ys) = small_model(**changes), (mode.from_tensor(tensor) for tensor in prompt())
    if inside:
        with mode:
            predictions = model(xs, ys)
    else:
        predictions = model(xs, ys)
    assert predictions.shape[:3] == (2, 2, 5)
    assert type(predictions) is type(xs)


def test_fake_parameters_of_functional_call_have_the_shapes():
    mode, model = FakeTensorMode(), small_model(n_embd=32, n_head=4)
    parameters = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
    predictions = functional_call(model, parameters, tuple(mode.from_tensor(t) for t in prompt()))
    assert tuple(predictions.shape) == (2, 2, 5)


@needs_engine
def test_sizes_may_be_symbolic_outside_of_any_mode():
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    model, (xs, _) = small_model(n_embd=32, n_head=4), prompt()
    symbols = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    xs = mode.from_tensor(xs, symbolic_context=symbols)
    predictions = model(xs, xs[..., 0])
    assert predictions.shape[0] == 2
    assert predictions.shape[1:] == xs.shape[:2]
    assert model.loss(xs, xs[..., 0]).shape == ()


@pytest.mark.parametrize("name", ["xs", "ys"])
def test_values_are_looked_at_where_there_are_some(name):
    """A mode that runs the ops, a FLOP counter say, does not hide NaN."""
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = small_model(), dict(zip(("xs", "ys"), prompt(), strict=True))
    inputs[name][1, 2] = torch.nan
    with FlopCounterMode(display=False), pytest.raises(ValueError, match=rf"{name}\[1, 2"):
        model(**inputs)


@pytest.fixture
def engine_model():
    torch._dynamo.reset()
    return small_model(n_embd=32, n_head=4)


@needs_engine
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_runs_other_sizes_and_loop_counts(engine_model, strict):
    xs, ys = prompt(B=2, n=5)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    exported = torch.export.export(
        engine_model, (xs, ys, 4), strict=strict,
        dynamic_shapes={"xs": sizes, "ys": sizes, "n_loops": Dim.DYNAMIC},
    ).module()  # fmt: skip
    for B, n, n_loops in ((2, 5, 4), (3, 8, 9)):
        xs, ys = prompt(B, n)
        assert torch.equal(exported(xs, ys, n_loops), engine_model(xs, ys, n_loops))


@pytest.mark.parametrize("n_embd", [16, 32], ids=["reference", "engine"])
@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_make_fx_traces_a_training_step(n_embd, tracing_mode):
    model, (xs, ys) = small_model(n_embd=n_embd), prompt()

    def gradients(xs, ys):
        return torch.autograd.grad(model.loss(xs, ys), list(model.parameters()))

    traced = make_fx(gradients, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(xs, ys)
    other = prompt()
    for found, expected in zip(traced(*other), gradients(*other), strict=True):
        assert relative_error(found, expected) < 64 * FP32_EPS


def test_aot_autograd_alone_traces_a_model():
    model, (xs, ys) = small_model(n_embd=32, n_head=4), prompt()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    compiled = aot_function(
        lambda parameters, xs, ys: functional_call(model, parameters, (xs, ys)),
        lambda graph, _: graph,
    )
    assert relative_error(compiled(parameters, xs, ys), model(xs, ys)) < 9 * FP32_EPS
