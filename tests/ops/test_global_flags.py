"""Global settings of PyTorch: results stay right, and a choice of a backend follows them."""

import re
import threading

import pytest
import torch
from conftest import FP32_EPS, needs_engine, prompt, relative_error, small_model

from looped_fast import LoopedTransformer, explain_backend
from looped_fast.ops import cpu_engine, op

ENGINE = {"n_embd": 64, "n_head": 4}  # sizes that the CPU engine takes
needs_bf16 = pytest.mark.skipif(
    cpu_engine.unsupported_precision("bf16") is not None,
    reason=f"no bf16 in the CPU engine: {cpu_engine.unsupported_precision('bf16')}",
)
without_onednn = torch.backends.mkldnn.flags
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def run(model, xs, ys):
    """Predictions, loss, and all gradients in one vector."""
    model.zero_grad()
    predictions, loss = model(xs, ys), model.loss(xs, ys)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return [predictions.detach(), loss.detach(), gradients]


def check(found, model, xs, ys, precision="fp32"):
    """Compare errors of ``run``'s results with those of plain PyTorch, both against float64."""
    plain, exact = (LoopedTransformer(model.config, "reference") for _ in range(2))
    for other in (plain, exact.double()):
        other.load_state_dict(model.state_dict())
    with autocast(precision):
        expected = run(plain, xs, ys)
    truths = run(exact, xs.double(), ys.double())
    for value, other, truth in zip(found, expected, truths, strict=True):
        error = relative_error(value, truth)
        assert error <= 3 * relative_error(other, truth) + 64 * FP32_EPS


@needs_engine
def test_float32_products_are_right_without_onednn():
    model, (xs, ys) = small_model(**ENGINE), prompt()
    with without_onednn(enabled=False):
        assert explain_backend(model, 2, 5).chosen == "cpu"
        check(run(model, xs, ys), model, xs, ys)


@needs_bf16
@pytest.mark.parametrize("first", [False, True], ids=["off, then on", "on, then off"])
def test_bf16_products_follow_onednn(first):
    """The reference runs without it, the engine with it, whatever ran before."""
    model, (xs, ys) = small_model(**ENGINE), prompt()
    found = {}
    for enabled in (first, not first, first):
        with without_onednn(enabled=enabled), autocast("bf16"):
            found[enabled] = run(model, xs, ys)
            chosen = explain_backend(model, 2, 5).chosen
            assert chosen == ("cpu" if enabled else "reference")
            tensors, settings = model._loop_arguments(model.embed(xs, ys), None, 4, 2, "add")
            ran = op.run(tensors, settings._replace(backend=chosen)).squeeze(-1)
            assert torch.equal(ran, found[enabled][0]), "what was chosen did not run"
    check(found[True], model, xs, ys, "bf16")
    check(found[False], model, xs, ys, "bf16")


@needs_bf16
def test_a_call_that_needs_onednn_says_so():
    model, (xs, ys) = small_model(**ENGINE), prompt()
    model.backend = "cpu"
    why = "can't run this: oneDNN, which multiplies in bf16, is switched off by torch.backends"
    with without_onednn(enabled=False), autocast("bf16"), pytest.raises(ValueError, match=why):
        model(xs, ys)
    with autocast("bf16"):
        predictions = model(xs, ys)
    message = "can't run this backward: oneDNN, which multiplies in bf16, is switched off"
    with without_onednn(enabled=False), pytest.raises(RuntimeError, match=re.escape(message)):
        predictions.sum().backward(retain_graph=True)
    predictions.sum().backward()  # and runs when it is on again


@needs_bf16
def test_set_flags_is_seen_by_models_that_have_chosen():
    model, (xs, ys) = small_model(**ENGINE), prompt()
    with autocast("bf16"), torch.no_grad():
        fast = model(xs, ys)
        before = torch.backends.mkldnn.set_flags(_enabled=False)
        try:
            plain = model(xs, ys)
        finally:
            torch.backends.mkldnn.set_flags(*before)
        assert not torch.equal(fast, plain)
        assert torch.equal(model(xs, ys), fast)


@needs_engine
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_float32_precision_leaves_the_engine_exact_and_is_named(precision):
    model, (xs, ys) = small_model(**ENGINE), prompt()
    highest = run(model, xs, ys)
    plain = explain_backend(model, 2, 5).reasons["reference"]
    torch.set_float32_matmul_precision(precision)
    try:
        reason = explain_backend(model, 2, 5).reasons["reference"]
        assert reason.startswith(f"{plain}, and multiplies in full float32 although torch.set_fl")
        for found, expected in zip(run(model, xs, ys), highest, strict=True):
            assert torch.equal(found, expected)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert explain_backend(model, 2, 5).reasons["reference"] == plain


@pytest.fixture
def flushed_denormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    yield
    torch.set_flush_denormal(False)


@needs_engine
@pytest.mark.usefixtures("flushed_denormals")
def test_flushed_denormals_leave_results_right():
    model, (xs, ys) = small_model(**ENGINE), prompt()
    xs[0, 0], ys[1, 1] = 1e-40, 1e-41
    check(run(model, xs, ys), model, xs, ys)


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_leaves_existing_models_alone(dtype):
    model, (xs, ys) = small_model(**ENGINE), prompt()
    expected = run(model, xs, ys)
    torch.set_default_dtype(dtype)
    try:
        found = run(model, xs, ys)
    finally:
        torch.set_default_dtype(torch.float32)
    for value, right in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, right)


def test_a_model_made_with_a_default_of_float64_is_float64():
    torch.set_default_dtype(torch.float64)
    try:
        model, (xs, ys) = LoopedTransformer(small_model().config), prompt(dtype=torch.float64)
        predictions = model(xs, ys)
    finally:
        torch.set_default_dtype(torch.float32)
    assert predictions.dtype == model.loss(xs, ys).dtype == torch.float64


@needs_engine
def test_a_default_device_leaves_existing_models_alone():
    model, (xs, ys) = small_model(**ENGINE), prompt()
    expected = run(model, xs, ys)
    torch.set_default_device("meta")
    try:
        found = run(model, xs, ys)
        made = LoopedTransformer(model.config)
        assert made(torch.randn(2, 5, 3), torch.randn(2, 5)).device.type == "meta"
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@needs_engine
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_deterministic_algorithms_leave_the_engine_as_it_is(precision):
    model, (xs, ys) = small_model(**ENGINE), prompt()
    results = []
    for on in (False, True):
        torch.use_deterministic_algorithms(on)
        with autocast(precision):
            results.append(run(model, xs, ys))
            assert explain_backend(model, 2, 5).chosen == "cpu"
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@needs_engine
def test_inference_mode_has_the_same_numbers_before_and_after_training():
    model, (xs, ys) = small_model(**ENGINE), prompt()
    expected = run(model, xs, ys)
    with torch.inference_mode():
        predictions, loss = model(xs, ys), model.loss(xs, ys)
        assert predictions.is_inference()
        made = prompt()
    assert torch.equal(predictions, expected[0])
    assert relative_error(loss, expected[1]) < 9 * FP32_EPS
    again = run(model, xs, ys)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))
    check(run(model, *made), model, *made)  # prompts made in inference mode train outside of it


@needs_engine
def test_a_model_made_in_inference_mode_runs_and_does_not_train():
    """Both backends say what PyTorch says of parameters made there."""
    with torch.inference_mode():
        model = small_model(**ENGINE)
    xs, ys = prompt()
    for model.backend in ("cpu", "reference"):
        with torch.no_grad():
            predictions = model(xs, ys)
        exact = LoopedTransformer(model.config, "reference").double()
        exact.load_state_dict(model.state_dict())
        truth = exact(xs.double(), ys.double())
        assert relative_error(predictions, truth) < 64 * FP32_EPS
        for call in (model, model.loss):
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backw"):
                call(xs, ys)


@needs_bf16
def test_a_flag_of_another_thread_is_that_of_the_process():
    """oneDNN is switched off for all threads, so a choice made in one holds in the others."""
    model, chosen = small_model(**ENGINE), []
    with without_onednn(enabled=False):
        thread = threading.Thread(
            target=lambda: chosen.append(explain_backend(model, 2, 5, "bf16").chosen)
        )
        thread.start()
        thread.join()
    assert chosen == ["reference"]
