"""Autocast casts what a layer before the model made, as it would for a Linear."""

import re

import pytest
import torch
from conftest import loop_inputs, needs_engine, prompt, random_weights, small_model
from foreign_models import Looped, Standard

from looped_fast import LoopedTransformer, accelerate, explain_backend, ops

ENGINE = {"n_embd": 32, "n_head": 4}  # sizes that the CPU engine takes
LOWERED = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def before(xs):
    """A layer before the model, whose result autocast lowers."""
    torch.manual_seed(1)
    return torch.nn.Linear(xs.shape[-1], xs.shape[-1])(xs)


@needs_engine
@LOWERED
@pytest.mark.parametrize("both", [False, True], ids=["xs", "xs and ys"])
def test_a_lowered_prompt_is_that_prompt_in_float32(dtype, both):
    model, (xs, ys) = small_model(**ENGINE), prompt()
    with torch.autocast("cpu", dtype):
        lowered = before(xs)
        targets = ys.to(dtype) if both else ys
        assert lowered.dtype == dtype
        predictions, error = model(lowered, targets), model.loss(lowered, targets)
        assert torch.equal(predictions, model(lowered.float(), targets.float()))
        assert torch.equal(error, model.loss(lowered.float(), targets.float()))
    assert predictions.dtype == error.dtype == torch.float32


def test_gradients_reach_the_layer_before_in_its_dtype():
    model, (xs, ys) = small_model(**ENGINE), prompt()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = before(xs).detach().requires_grad_()
        raised = lowered.detach().float().requires_grad_()
        for x in (lowered, raised):
            model.loss(x, ys).backward()
    assert lowered.grad.dtype == torch.bfloat16
    assert torch.equal(lowered.grad, raised.grad.bfloat16())


def test_a_model_that_runs_module_by_module_takes_lowered_prompts():
    model, (xs, ys) = small_model(), prompt()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = before(xs)
        model._backbone.transformer["ln_f"].register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="module by module"):
            predictions = model(lowered, ys.bfloat16())
        assert torch.equal(predictions, model(lowered.float(), ys.bfloat16().float()))
        model.loss(lowered, ys.bfloat16()).backward()


@pytest.mark.parametrize("name", ["xs", "ys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_without_autocast_another_dtype_is_refused_with_the_remedy(name, dtype):
    model, inputs = small_model(), dict(zip(("xs", "ys"), prompt(), strict=True))
    inputs[name] = inputs[name].to(dtype)
    message = re.escape(f"{name} is {dtype} on cpu, the model is torch.float32 on cpu; convert")
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_autocast_casts_no_dtype_that_it_would_not_cast_for_a_linear(dtype):
    model, (xs, ys) = small_model(), prompt()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            model._read_in(xs.to(dtype))
        with pytest.raises(ValueError, match=f"xs is {dtype}"):
            model(xs.to(dtype), ys)


@needs_engine
@LOWERED
def test_the_loop_casts_embeddings_state_and_targets(dtype):
    inputs = loop_inputs(D=32, dtype=torch.float32, n_outputs=1)
    targets = torch.randn(2, 3, 1)
    settings = {"n_heads": 4, "n_loops": 3, "window": 2}
    lowered = {name: inputs[name].to(dtype) for name in ("embeddings", "state")}
    raised = {name: tensor.float() for name, tensor in lowered.items()}
    with torch.autocast("cpu", dtype):
        states = ops.loop(**inputs | lowered, **settings)
        assert states.dtype == torch.float32
        assert torch.equal(states, ops.loop(**inputs | raised, **settings))
        error = ops.loop_mse(**inputs | lowered, targets=targets.to(dtype), **settings)
        same = ops.loop_mse(**inputs | raised, targets=targets.to(dtype).float(), **settings)
        assert torch.equal(error, same)
    with pytest.raises(ValueError, match=f"embeddings are {dtype}"):
        ops.loop(**inputs | lowered, **settings)


def test_autocast_leaves_weights_that_differ_from_each_other_refused():
    inputs = loop_inputs(D=32, dtype=torch.float32)
    inputs["weights"] = [w.bfloat16() for w in random_weights(32, 1, torch.float32)]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"is torch\.bfloat16"),
    ):
        ops.loop(**inputs, n_heads=4, n_loops=2, window=1)


@pytest.mark.parametrize(("make", "arguments"), [(Looped, (1, 3)), (Standard, (False,))])
def test_an_accelerated_model_takes_what_the_original_takes(make, arguments):
    model, (xs, ys) = make(), prompt(d=5)

    def predict(xs, ys):
        returned = model(xs, ys, *arguments)
        return returned if isinstance(returned, torch.Tensor) else torch.stack(returned)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        lowered = before(xs)
        original = [predict(lowered, ys), predict(lowered, ys.bfloat16())]
        accelerate(model)
        accelerated = [predict(lowered, ys), predict(lowered, ys.bfloat16())]
    for ours, theirs in zip(accelerated, original, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


@needs_engine
def test_a_bf16_adapter_before_a_float32_model_trains():
    """The layer before gets the gradient that it gets when the cast is written out."""
    model, (xs, ys) = small_model(**ENGINE), prompt()
    assert explain_backend(model, 2, 5).chosen == "cpu"
    gradients = []
    for cast in (lambda x: x, torch.Tensor.float):
        torch.manual_seed(1)
        adapter = torch.nn.Linear(3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(cast(adapter(xs)), ys).backward()
        gradients.append(adapter.weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_a_float64_model_keeps_its_error_under_autocast():
    model = LoopedTransformer(small_model().config).double()
    xs, ys = prompt(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="needs float32"):
        model(xs, ys)
