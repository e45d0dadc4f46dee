"""Queries that share a sequence's first tokens: ``seen`` of ``ops.loop``."""

import pytest
import torch
from conftest import FP32_EPS, cast, loop_inputs, naive_loop, needs_engine, relative_error
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from looped_fast import ops
from looped_fast.config import INJECTIONS
from looped_fast.ops import cpu_engine

PRECISIONS = [p for p in ("fp32", "bf16") if cpu_engine.unsupported_precision(p) is None]


def one_sequence_each(inputs, seen, **call):
    """Outputs at each query's token of a sequence that ends with it, by formulas: [W, B, m, .]."""
    inputs = dict(inputs)
    weight, bias = inputs.pop("read_out")
    n_shared = inputs["embeddings"].shape[1] - len(seen)
    states = []
    for i, n in enumerate(seen.tolist()):
        tokens = [*range(n), n_shared + i]
        alone = {name: inputs[name][:, tokens] for name in ("embeddings", "state")}
        alone |= {"positions": inputs["positions"][tokens], "weights": inputs["weights"]}
        states.append(naive_loop(alone, **call)[:, :, -1:])
    return torch.cat(states, 2) @ weight.T + bias


def problem(n_shared, m, seen="mixed", **sizes):
    inputs = loop_inputs(S=n_shared + m, n_outputs=1, **sizes)
    if seen == "mixed":
        return inputs, torch.randint(0, n_shared + 1, (m,))
    return inputs, torch.full((m,), n_shared if seen == "all" else 0)


def run(inputs, seen, **call):
    with torch.no_grad():
        return ops.loop(**inputs, seen=seen, **call)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("seen", ["all", "none", "mixed"])
@pytest.mark.parametrize("sizes", [{"n_shared": 6, "m": 5}, {"n_shared": 0, "m": 3, "n_layer": 2}])
def test_each_query_is_computed_as_if_it_alone_followed_what_it_sees(injection, seen, sizes):
    inputs, counts = problem(seen=seen, **sizes)
    call = {"n_heads": 2, "n_loops": 4, "window": 2, "injection": injection}
    expected = one_sequence_each(inputs, counts, **call)
    found = run(inputs, counts, **call, backend="reference")
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def check_engine(inputs, seen, precision, **call):
    """The engine's error against float64 is at most twice plain PyTorch's."""
    truth = run(inputs, seen, **call, backend="reference")
    low = cast(inputs, torch.float32)
    plain = run(low, seen, **call, precision=precision, backend="reference")
    fast = run(low, seen, **call, precision=precision, backend="cpu")
    assert fast.shape == truth.shape
    assert fast.isfinite().all()
    assert relative_error(fast, truth) <= 2 * relative_error(plain, truth) + 4 * FP32_EPS


@needs_engine
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.fixed_dictionaries({
        "B": st.integers(1, 4), "n_shared": st.integers(0, 70), "m": st.integers(1, 70),
        "D": st.sampled_from([32, 64, 96]), "n_layer": st.integers(1, 2),
    }),
    seen=st.sampled_from(["all", "none", "mixed"]),
    injection=st.sampled_from(INJECTIONS),
    n_threads=st.integers(1, 3),
)  # fmt: skip
@example(  # more shared tokens than a chunk of keys
    sizes={"B": 1, "n_shared": 301, "m": 40, "D": 32, "n_layer": 1}, seen="mixed",
    injection="add", n_threads=2,
)  # fmt: skip
@example(  # several sequences to an item
    sizes={"B": 40, "n_shared": 4, "m": 3, "D": 32, "n_layer": 1}, seen="mixed",
    injection="mul", n_threads=2,
)  # fmt: skip
@example(  # more queries than rows of the hidden layer that are in cache at a time
    sizes={"B": 1, "n_shared": 12, "m": 500, "D": 64, "n_layer": 1}, seen="all",
    injection="add", n_threads=2,
)  # fmt: skip
def test_the_engine_is_as_accurate_as_plain_pytorch(precision, sizes, seen, injection, n_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        inputs, counts = problem(seen=seen, **sizes)
        call = {"n_heads": 2, "n_loops": 3, "window": 2, "injection": injection}
        check_engine(inputs, counts, precision, **call)
    finally:
        torch.set_num_threads(before)


@needs_engine
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_loops", [1, 5, 10, 30])  # 1, T, b, 3b
def test_the_engine_s_accuracy_holds_over_many_loops(precision, n_loops, two_threads):
    inputs, seen = problem(14, 40, D=64)
    check_engine(inputs, seen, precision, n_heads=4, n_loops=n_loops, window=1)


@needs_engine
def test_the_paper_s_size_is_accurate(two_threads):
    inputs, seen = problem(80, 100, D=256, B=1)
    check_engine(inputs, seen, "fp32", n_heads=8, n_loops=2, window=1)


@needs_engine
def test_states_are_those_of_all_tokens():
    inputs, seen = problem(6, 4, D=32)
    inputs = cast({k: v for k, v in inputs.items() if k != "read_out"}, torch.float32)
    call = {"n_heads": 2, "n_loops": 3, "window": 2}
    fast, plain = (run(inputs, seen, **call, backend=backend) for backend in ("cpu", "reference"))
    assert fast.shape == (2, 2, 10, 32)
    assert relative_error(fast, plain) < 9 * FP32_EPS


@needs_engine
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_counted_operations_are_those_of_the_products(backend):
    inputs, seen = problem(6, 4, D=32)
    inputs = cast(inputs, torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(inputs, seen, n_heads=2, n_loops=3, window=2, backend=backend)
    tokens, D, keys = 2 * 10, 32, 6
    assert counter.get_total_flops() == 3 * tokens * (24 * D**2 + 4 * D * keys) + 4 * tokens * D


@needs_engine
def test_torch_compile_takes_it_without_a_graph_break():
    inputs, seen = problem(6, 4, D=32)
    inputs = cast(inputs, torch.float32)

    def call(seen):
        return run(inputs, seen, n_heads=2, n_loops=3, window=2)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(seen), call(seen), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (torch.tensor([1.0, 2.0]), "int64"),
        (torch.tensor([[1, 2]]), r"\[m\] int64"),
        (torch.arange(11), "only 10 tokens"),
        (torch.tensor([1, 9]), r"holds 9; a query sees 0..8"),
        (torch.tensor([-1, 3]), r"holds -1; a query sees 0..8"),
    ],
)
def test_a_wrong_seen_is_refused(seen, message):
    inputs, _ = problem(8, 2)
    with pytest.raises(ValueError, match=message):
        run(inputs, seen, n_heads=2, n_loops=2, window=1)


def test_a_gradient_is_refused():
    inputs, seen = problem(8, 2)
    inputs["weights"][2].requires_grad_()
    with pytest.raises(ValueError, match=r"torch.no_grad"):
        ops.loop(**inputs, seen=seen, n_heads=2, n_loops=2, window=1)


@pytest.mark.parametrize("backend", ["compiled", "triton"])
def test_backends_without_it_say_so(backend):
    inputs, seen = problem(8, 2, D=32)
    with pytest.raises(ValueError, match="queries that share examples"):
        run(cast(inputs, torch.float32), seen, n_heads=2, n_loops=2, window=1, backend=backend)
