from __future__ import annotations

import re
import shutil

import pytest
import torch
import torch._inductor.config
from conftest import (
    CALL,
    FP32_EPS,
    leaves,
    loop_inputs,
    naive_loop,
    prompt,
    relative_error,
    require_grad,
    small_model,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from without_coverage import untraced

from looped_fast import ops
from looped_fast.ops import backends
from looped_fast.ops.block import GPT2, block_names

opcheck = untraced(torch.library.opcheck)  # it compiles the loop with symbolic shapes


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(inputs, **changes):
    settings = {"n_heads": 2, "n_loops": 3, "window": 2, **changes}
    return ops.loop(**inputs, **settings)


def raw_args(inputs, n_loops, window, injection="add", precision="fp32", recompute=False):
    tensors = [*inputs.values()] if "read_out" in inputs else [*inputs.values(), []]
    return (*tensors, 2, n_loops, window, injection, precision, recompute, "auto", "auto")


@pytest.mark.parametrize("n_outputs", [0, 3])
@pytest.mark.parametrize("injection", ["add", "every_block"])
def test_the_op_equals_its_formulas(injection, n_outputs):
    inputs = loop_inputs(n_layer=2, n_outputs=n_outputs)
    expected = naive_loop(inputs, 2, 3, 2, injection)
    torch.testing.assert_close(run(inputs, injection=injection), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("injection", ["add", "mul", "none", "every_block"])
def test_gradients_equal_finite_differences(injection):
    inputs = require_grad(loop_inputs(B=1, S=3, D=4, n_layer=1))
    names = list(leaves(inputs))

    def of_leaves(*tensors):
        e, p, z, *weights = tensors
        return ops.loop(e, p, z, weights, n_heads=2, n_loops=2, window=2, injection=injection)

    assert names[:3] == ["embeddings", "positions", "state"]
    assert torch.autograd.gradcheck(of_leaves, tuple(leaves(inputs).values()), fast_mode=True)


def test_one_step_gradients_equal_finite_differences_from_the_state_before():
    """With a window of 1 in 3 loops the gradient is that of the last step at a fixed state."""
    inputs = require_grad(loop_inputs(B=1, S=3, D=4))
    state = ops.loop(**inputs, n_heads=2, n_loops=2, window=1)[0].detach()
    direction = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    run(inputs, n_loops=3, window=1).backward(direction)
    step = 1e-6
    for name in ("embeddings", "positions"):
        values = inputs[name].detach()
        numeric = torch.zeros_like(values)
        for i in range(values.numel()):
            ends = []
            for sign in (1, -1):
                moved = values.clone()
                moved.view(-1)[i] += sign * step
                with torch.no_grad():
                    out = run({**inputs, "state": state, name: moved}, n_loops=1, window=1)
                ends.append((out * direction).sum())
            numeric.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(inputs[name].grad, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("n_layer", "n_loops", "window", "injection", "precision", "dtype", "n_outputs"),
    [
        (1, 2, 2, "add", "fp32", torch.float64, 0),
        (2, 2, 1, "every_block", "fp32", torch.float32, 2),
        (1, 2, 1, "mul", "bf16", torch.float32, 1),
    ],
)
def test_the_op_passes_opcheck(n_layer, n_loops, window, injection, precision, dtype, n_outputs):
    inputs = require_grad(loop_inputs(2, 5, 8, n_layer, dtype, n_outputs))
    args = raw_args(inputs, n_loops, window, injection, precision)
    opcheck(torch.ops.looped_fast.loop.default, args)


def test_the_op_passes_opcheck_without_gradient():
    args = raw_args(loop_inputs(S=5, D=8), 2, 1)
    opcheck(torch.ops.looped_fast.loop.default, args)


@pytest.mark.parametrize(("dtype", "n_outputs"), [(torch.float32, 0), (torch.float64, 2)])
def test_the_fake_op_knows_shape_and_dtype(dtype, n_outputs):
    with FakeTensorMode():
        outputs = run(loop_inputs(B=3, S=5, D=8, dtype=dtype, n_outputs=n_outputs))
    shape = (2, 3, 3, n_outputs) if n_outputs else (2, 3, 5, 8)
    assert (tuple(outputs.shape), outputs.dtype) == (shape, dtype)


def test_a_read_out_keeps_its_precision_under_autocast():
    inputs = loop_inputs(dtype=torch.float32, n_outputs=1)
    weight, bias = inputs["read_out"]
    with torch.autocast("cpu", torch.bfloat16):
        predictions = run(inputs, precision="bf16", backend="reference")
    states = run({**inputs, "read_out": ()}, precision="bf16", backend="reference")
    assert torch.equal(predictions, (states @ weight.T + bias)[:, :, ::2])


def compare_compiled(compiler, autocast_dtype=None, n_loops=3, window=2, ulps=64):
    """Compare loss and gradients of a training step, compiled in one graph, with eager ones."""
    model = small_model()
    xs, ys = prompt(B=3, n=6)

    def loss():
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast_dtype is not None):
            predictions = model(xs, ys, n_loops, window)
        return (predictions - ys).square().mean()

    results = []
    for compute in (loss, torch.compile(loss, backend=compiler, fullgraph=True)):
        model.zero_grad()
        value = compute()
        value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append({"loss": value.detach(), **gradients})
    for name, eager in results[0].items():
        assert relative_error(results[1][name], eager) <= ulps * FP32_EPS, name


@pytest.mark.parametrize(("n_loops", "window"), [(2, 2), (4, 2)])
def test_a_compiled_training_step_is_one_graph_with_the_same_numbers(n_loops, window):
    counter = CompileCounterWithBackend("aot_eager")
    compare_compiled(counter, n_loops=n_loops, window=window)
    assert counter.frame_count == 1


def test_a_compiled_training_step_follows_autocast():
    # The same bf16 products, in the same order: what differs is fp32 rounding.
    compare_compiled("aot_eager", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_forward_pass_compiled_by_inductor_has_the_same_numbers():
    model = small_model()
    arguments = prompt(B=3, n=6)
    compiled = torch.compile(model, fullgraph=True)
    settings = {"compile_threads": 1, "cpp_cache_precompile_headers": False}  # slow to start
    with torch.no_grad(), torch._inductor.config.patch(settings):
        error = relative_error(compiled(*arguments, 1, 1), model(*arguments, 1, 1))
    assert error <= 64 * FP32_EPS


def test_a_model_call_has_no_graph_break():
    model = small_model()
    explanation = torch._dynamo.explain(model)(*prompt())
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


def replaced(**changes):
    return {**loop_inputs(dtype=torch.float32), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": torch.zeros(6, 16)}, r"embeddings have shape (6, 16); [B, S, D]"),
        ({"positions": torch.zeros(5, 16)}, r"positions has shape (5, 16); (6, 16) is needed"),
        ({"positions": torch.zeros(6, 8)}, r"positions has shape (6, 8); (6, 16) is needed"),
        ({"state": torch.zeros(3, 6, 16)}, r"state has shape (3, 6, 16); (2, 6, 16) is needed"),
        ({"state": torch.zeros(2, 6, 16).half()}, "state is torch.float16 on cpu"),
        ({"positions": torch.zeros(6, 16).double()}, "positions is torch.float64 on cpu"),
        ({"state": torch.zeros(2, 6, 16, device="meta")}, "state is torch.float32 on meta"),
        ({"read_out": (torch.zeros(2, 8), torch.zeros(2))}, "read_out weight has shape (2, 8)"),
        ({"read_out": (torch.zeros(2, 16), torch.zeros(3))}, "read_out weight has shape (2, 16)"),
        (
            {"read_out": (torch.zeros(2, 16), torch.zeros(2).half())},
            "read_out bias is torch.float16 on cpu",
        ),
        ({"read_out": (torch.zeros(16),)}, "read_out holds 1 tensors; weight and bias are needed"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(replaced(**changes))


@pytest.mark.parametrize("index", range(26))
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_weight_that_does_not_fit_is_named(index, change):
    inputs = loop_inputs(n_layer=2, dtype=torch.float32)
    weight = inputs["weights"][index]
    inputs["weights"][index] = weight.double() if change == "dtype" else weight[1:]
    if index < 24:
        name = f"block {index // 12} {block_names(GPT2)[index % 12]}"
    else:
        name = ("ln_f weight", "ln_f bias")[index - 24]
    expected = "is torch.float64" if change == "dtype" else f"has shape {tuple(weight[1:].shape)}"
    with pytest.raises(ValueError, match=re.escape(f"{name} {expected}")):
        run(inputs)


@pytest.mark.parametrize("count", [0, 2, 13, 15, 25])
def test_a_wrong_number_of_weights_is_refused(count):
    weights = loop_inputs(n_layer=2)["weights"][:count]
    with pytest.raises(ValueError, match=f"{count} weights; 12 per block and 2 for the final"):
        run({**loop_inputs(), "weights": weights})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "D = 16 is not divisible by n_heads = 3"),
        ({"n_heads": 0}, "D = 16 is not divisible by n_heads = 0"),
        ({"n_loops": 0}, "n_loops = 0: at least 1"),
        ({"window": 0}, "window = 0 is outside 1..3 (n_loops); lower window or raise n_loops"),
        ({"window": 4}, "window = 4 is outside 1..3 (n_loops); lower window or raise n_loops"),
        ({"injection": "multiply"}, "unknown injection 'multiply'"),
        ({"injection": "everyblock"}, "did you mean 'every_block'?"),
        ({"precision": "bf61"}, "unknown precision 'bf61'; did you mean 'bf16'?"),
        ({"backend": "refrence"}, "unknown backend 'refrence'; did you mean 'reference'?"),
        ({"precision": "bf16"}, "precision 'bf16' needs float32 tensors, not torch.float64"),
    ],
)
def test_a_bad_setting_is_refused_with_a_remedy(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(loop_inputs(), **changes)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_forced_backend_that_can_not_run_says_why(backend):
    inputs = loop_inputs(dtype=torch.float64)  # neither engine takes float64
    with pytest.raises(ValueError, match=rf"backend '{backend}' can't run this: .+ backend='auto'"):
        run(inputs, backend=backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("refrence", torch.float32, "unknown backend 'refrence'; did you mean 'reference'?"),
        ("triton", torch.float64, "backend 'triton' can't run this: "),
    ],
)
def test_a_backend_that_can_not_embed_a_prompt_is_refused(backend, dtype, message):
    xs, ys = prompt(dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.read_in(xs, ys, torch.ones(64, 3, dtype=dtype), torch.ones(64), backend=backend)


@pytest.fixture(params=["cpu", "triton"])
def fast_loop(request):
    """The loop on a fast backend as a function of embeddings, and embeddings [1, 4, 64]."""
    if reason := backends.UNSUPPORTED[request.param](CALL):
        pytest.skip(reason)
    inputs = loop_inputs(B=1, S=4, D=64, dtype=torch.float32)

    def loop(embeddings, backend=request.param):
        changed = {**inputs, "embeddings": embeddings}
        return ops.loop(**changed, n_heads=4, n_loops=1, window=1, backend=backend)

    return loop, inputs["embeddings"].requires_grad_()


def test_a_second_derivative_is_refused_with_the_remedy(fast_loop):
    loop, embeddings = fast_loop
    loss = loop(embeddings).square().sum()
    (first,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; use backend='reference'"):
        (loss + first.square().sum()).backward()
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(
            loop(embeddings, "reference").square().sum(), embeddings, create_graph=True
        )
        first.square().sum().backward()
    assert embeddings.grad.abs().sum() > 0


class Unused(torch.autograd.Function):
    """The identity, with no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_undefined_gradient_of_the_states_is_none_of_the_inputs(fast_loop):
    loop, embeddings = fast_loop
    loss = Unused.apply(loop(embeddings)).sum()
    assert torch.autograd.grad(loss, embeddings, allow_unused=True) == (None,)


def directional(loss, embeddings):
    direction = torch.ones_like(embeddings).cumsum(-1)
    return torch.func.jvp(loss, (embeddings,), (direction,))[1]


def directional_by_dual_numbers(loss, embeddings):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeddings, torch.ones_like(embeddings).cumsum(-1))
        return forward_ad.unpack_dual(loss(dual)).tangent


DERIVATIVES = {
    "grad": lambda loss, embeddings: torch.func.grad(loss)(embeddings),
    "jacrev": lambda loss, embeddings: torch.func.jacrev(loss)(embeddings),
    "vmap": lambda loss, embeddings: torch.vmap(torch.func.grad(loss))(embeddings[None]),
    "jvp": directional,
    "dual": directional_by_dual_numbers,
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_only_the_reference_is_inside_other_derivatives(fast_loop, derivative):
    loop, embeddings = fast_loop
    embeddings = embeddings.detach()

    def loss(backend):
        return lambda embeddings: loop(embeddings, backend).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = derivative(loss("reference"), embeddings)
        assert expected.abs().sum() > 0
        assert torch.equal(derivative(loss("auto"), embeddings), expected)
    with pytest.raises(ValueError, match=r"can't run this: inside .*backend='auto'"):
        derivative(lambda embeddings: loop(embeddings).sum(), embeddings)


def test_the_transform_around_is_the_reason_against_fast_backends():
    seen = []
    torch.func.grad(lambda x: seen.append(backends.select(CALL)) or x)(torch.ones(()))
    assert seen[0].chosen == "reference"
    assert seen[0].reasons["cpu"] == "inside a torch.func transform"
