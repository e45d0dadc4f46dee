"""The reference's loop with a compiled step. ``aot_eager`` stands in for Inductor, which is slow:
it traces and differentiates in the same way, and then runs the traced ops uncompiled.
"""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
import torch._inductor.config
from conftest import (
    CALL,
    FP32_EPS,
    cast,
    changed,
    leaves,
    loop_inputs,
    prompt,
    relative_error,
    require_grad,
    small_model,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from looped_fast import ops
from looped_fast.ops import backends, compiled_backend


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    compiled_backend.empty_cache()
    yield
    torch._dynamo.reset()
    compiled_backend.empty_cache()


@pytest.fixture
def counter(monkeypatch):
    """Compile with ``aot_eager``, and count in ``frame_count``."""
    counting = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    return counting


def states_and_gradients(inputs, grad: Tensor, **arguments) -> dict[str, Tensor]:
    """States of ``ops.loop``, and gradients of (states * grad).sum() by names of ``leaves``."""
    inputs = require_grad(inputs)
    settings = {"n_heads": 2, "n_loops": 3, "window": 2, **arguments}
    states = ops.loop(**inputs, **settings)
    (states * grad.to(states.dtype)).sum().backward()
    gradients = {name: t.grad for name, t in leaves(inputs).items() if t.grad is not None}
    return {"states": states.detach(), **gradients}


def check_against_float64(precision: str, D: int = 16, n_layer: int = 1, **arguments) -> None:
    """DESIGN.md: at most twice (gradients: three times) the error of plain PyTorch."""
    inputs = loop_inputs(B=2, S=6, D=D, n_layer=n_layer)
    window = arguments.get("window", 2)
    grad = torch.randn(window, 2, 6, D)
    on_reference = {**arguments, "backend": "reference"}
    truth = states_and_gradients(cast(inputs, torch.float64), grad, **on_reference)
    single = cast(inputs, torch.float32), cast(inputs, torch.float32)
    plain = states_and_gradients(single[0], grad, precision=precision, **on_reference)
    arguments |= {"precision": precision, "backend": "compiled"}
    compiled = states_and_gradients(single[1], grad, **arguments)
    assert compiled.keys() == truth.keys()
    for name, exact in truth.items():
        factor = 2 if name == "states" else 3
        limit = factor * relative_error(plain[name], exact) + 4 * FP32_EPS
        error = relative_error(compiled[name], exact)
        assert error <= limit, f"{name}: error {error:.1e}, at most {limit:.1e} is right"


@pytest.mark.parametrize(
    ("precision", "arguments"),
    [
        ("fp32", {"injection": "add"}),
        ("bf16", {"injection": "add", "window": 3}),
        ("bf16", {"injection": "mul", "recompute": True}),
        ("fp32", {"injection": "none", "n_layer": 2}),
        ("fp32", {"injection": "every_block", "n_layer": 2, "window": 1}),
        ("bf16", {"injection": "every_block", "n_layer": 2, "window": 1}),
    ],
    ids=str,
)
def test_states_and_gradients_against_float64(counter, precision, arguments):
    check_against_float64(precision, **arguments)
    assert counter.frame_count > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductors_code_against_float64():
    settings = {"compile_threads": 1, "cpp_cache_precompile_headers": False}  # slow to start
    with torch._inductor.config.patch(settings):
        check_against_float64("bf16", D=32, n_loops=1, window=1)  # one compilation


def test_float64_is_computed_in_float64(counter):
    inputs = loop_inputs()
    settings = {"n_heads": 2, "n_loops": 3, "window": 2}
    expected = ops.loop(**inputs, **settings, backend="reference")
    compiled = ops.loop(**inputs, **settings, backend="compiled")
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)


def test_recomputed_gradients_are_the_same_bits(counter):
    inputs, grad = loop_inputs(dtype=torch.float32), torch.randn(2, 2, 6, 16)

    def gradients(recompute: bool) -> dict[str, Tensor]:
        copied = cast(inputs, torch.float32)
        return states_and_gradients(copied, grad, recompute=recompute, backend="compiled")

    kept, recomputed = gradients(False), gradients(True)
    for name in kept:
        assert torch.equal(recomputed[name], kept[name]), name


@pytest.mark.parametrize("injection", ["add", "mul", "none"])
def test_a_shape_is_compiled_twice_with_gradients_and_without(counter, injection):
    """A first state that is the embeddings, and other loop counts, compile nothing more."""
    model = small_model(injection=injection)
    model.backend = "compiled"
    xs, ys = prompt()
    for n_loops in (4, 6):
        model.loss(xs, ys, n_loops=n_loops, window=2).backward()
        with torch.no_grad():
            model(xs, ys, n_loops=n_loops)
    assert counter.frame_count == 2


def test_more_shapes_are_compiled_than_pytorch_lets_a_function_have(counter):
    """Each shape is compiled once. PyTorch's limit of recompilations, 8, is set to 2 here."""
    model = small_model()
    model.backend = "compiled"
    n_shapes = 5
    batches = [prompt(B=B, n=3) for B in range(1, n_shapes + 1)]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            for xs, ys in batches:
                model(xs, ys, 1, 1)
    assert counter.frame_count == n_shapes


def test_compiled_steps_are_bounded(counter, monkeypatch):
    monkeypatch.setattr(
        compiled_backend, "_compiled_step",
        functools.lru_cache(2)(compiled_backend._compiled_step.__wrapped__),
    )  # fmt: skip
    model = small_model()
    model.backend = "compiled"
    with torch.no_grad():
        for B in (1, 2, 3, 2, 1):
            model(*prompt(B=B, n=3), 1, 1)
    assert counter.frame_count == 4  # the first one again, after two others
    assert compiled_backend._compiled_step.cache_info().currsize == 2


def test_second_derivatives_are_refused(counter):
    inputs = require_grad(loop_inputs(dtype=torch.float32))
    settings = {"n_heads": 2, "n_loops": 1, "window": 1, "backend": "compiled"}
    states = ops.loop(**inputs, **settings)
    (first,) = torch.autograd.grad(
        states.square().sum(), inputs["embeddings"], create_graph=True, retain_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


# --- where it can't run ---------------------------------------------------------------------------


def test_it_is_not_chosen_on_a_cpu():
    explanation = backends.select(CALL)
    assert explanation.chosen != "compiled"
    assert "runs when asked for" in explanation.reasons["compiled"]
    assert "takes many seconds" in explanation.reasons["compiled"]


def refusal() -> str:
    with pytest.raises(ValueError, match="'compiled' can't run this") as caught:
        backends.select(changed(CALL, backend="compiled"))
    return str(caught.value)


def test_without_a_cpp_compiler_it_says_so(monkeypatch):
    compiled_backend._missing_compiler.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "there is no no-such-compiler -O2; install it or set CXX" in refusal()
    compiled_backend._missing_compiler.cache_clear()


def test_where_torch_compile_is_switched_off_it_says_so(monkeypatch):
    with torch._dynamo.config.patch(disable=True):  # which TORCH_COMPILE_DISABLE sets
        assert "torch.compile is switched off" in refusal()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "torch.compile is switched off" in refusal()


def test_on_other_devices_it_says_so():
    problem = changed(CALL, device="mps")
    assert "tensors are on mps" in backends.select(problem).reasons["compiled"]


def test_inside_a_dispatch_mode_it_says_so():
    with FakeTensorMode():
        assert "sees single operations" in refusal()


def test_inside_torch_compile_it_says_so():
    model = small_model()
    model.backend = "compiled"
    outer = torch.compile(lambda xs, ys: model(xs, ys), backend="eager")
    with pytest.raises(Exception, match=r"inside torch\.compile or another TorchDispatchMode"):
        outer(*prompt())


def test_inside_a_function_transform_it_says_so():
    seen = []
    torch.func.grad(lambda x: seen.append(refusal()) or x.sum())(torch.ones(2))
    assert "inside a torch.func transform" in seen[0]
