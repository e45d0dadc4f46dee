"""The CPU engine on blocks like TRM's, by DESIGN.md's rule; see test_cpu_engine.py for GPT-2's."""

from __future__ import annotations

import pytest
import torch
from block_cases import block_inputs, other_positions
from conftest import cast, leaves, needs_engine, require_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu_engine import INJECTIONS, PRECISIONS, check

from looped_fast import ops
from looped_fast.ops.block import GPT2, TRM
from looped_fast.ops.call import SharedWeights

pytestmark = needs_engine


def check_block(block, precision, *, B=2, S=9, D=64, n_layer=1, n_outputs=0, **arguments):
    inputs = block_inputs(block, B, S, D, n_layer)
    if n_outputs:
        inputs["read_out"] = [torch.randn(n_outputs, D).double(), torch.randn(n_outputs).double()]
    positions = other_positions(block, S, D // arguments["n_heads"])
    check(inputs, precision, block=block, **positions, **arguments)


@st.composite
def problems(draw):
    D, n_heads = draw(
        st.sampled_from([(32, 1), (32, 2), (32, 4), (64, 1), (64, 8), (96, 3), (160, 5), (128, 4)])
    )
    n_loops = draw(st.integers(1, 3))
    return {
        "B": draw(st.integers(1, 20)),
        "S": draw(st.integers(1, 50)),
        "D": D,
        "n_layer": draw(st.integers(1, 3)),
        "n_heads": n_heads,
        "n_loops": n_loops,
        "window": draw(st.integers(1, n_loops)),
        "injection": draw(st.sampled_from(INJECTIONS)),
        "recompute": draw(st.booleans()),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    problem=problems(),
    hidden=st.sampled_from([32, 96, 256, None]),
    mask=st.sampled_from(["full", "causal"]),
    positions=st.sampled_from(["rotary", "none", "learned"]),
    n_threads=st.integers(1, 3),
)
def test_random_blocks_like_trms_are_as_accurate_as_plain_pytorch(
    precision, problem, hidden, mask, positions, n_threads
):
    block = TRM._replace(mlp_hidden=hidden, mask=mask, positions=positions, norm_eps=1e-4)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        check_block(block, precision, **problem)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_read_out_of_such_a_block(precision, recompute):
    block = TRM._replace(mlp_hidden=96)
    arguments = {"n_heads": 4, "n_loops": 3, "window": 2, "recompute": recompute}
    check_block(block, precision, B=5, n_outputs=2, **arguments)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_mean_squared_error_of_such_a_block(precision):
    block = TRM._replace(mlp_hidden=96)
    exact = block_inputs(block, B=5, S=9, D=64, n_layer=2)
    exact["read_out"] = [torch.randn(1, 64).double(), torch.randn(1).double()]
    targets, positions = torch.randn(5, 5, 1).double(), other_positions(block, 9, 16)["positions"]
    arguments = {"n_heads": 4, "n_loops": 3, "window": 2, "block": block}

    def gradients(dtype, backend, precision):
        inputs = require_grad(cast(exact, dtype))
        error = ops.loop_mse(
            **inputs, positions=positions.to(dtype), targets=targets.to(dtype), **arguments,
            backend=backend, precision=precision,
        )  # fmt: skip
        error.backward()
        return [error.detach(), *(t.grad for t in leaves(inputs).values() if t.grad is not None)]

    truth = gradients(torch.float64, "reference", "fp32")
    plain = gradients(torch.float32, "reference", precision)
    for ours, theirs, expected in zip(
        gradients(torch.float32, "cpu", precision), plain, truth, strict=True
    ):
        size = expected.norm()
        assert (ours - expected).norm() <= 3 * (theirs - expected).norm() + 1e-6 * size


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("S", [256, 257, 1000])  # keys of one chunk, and of several
def test_long_sequences(precision, mask, S, two_threads):
    block = TRM._replace(mlp_hidden=64, mask=mask)
    check_block(block, precision, B=1, S=S, D=32, n_heads=2, n_loops=2, window=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_public_size(precision, two_threads):
    block = TRM._replace(mlp_hidden=1536)
    check_block(block, precision, B=2, S=97, D=512, n_layer=2, n_heads=8, n_loops=2, window=2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_loops", [1, 6, 21])
def test_accuracy_holds_over_many_loops(precision, n_loops):
    block = TRM._replace(mlp_hidden=256)
    window = min(n_loops, 7)
    check_block(block, precision, S=13, n_heads=4, n_layer=2, n_loops=n_loops, window=window)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("changes", "hidden"),
    [
        ({"mask": "full"}, None),
        ({"positions": "none"}, None),
        ({"mask": "full", "positions": "none", "norm_eps": 1e-3}, 64),
        ({}, 320),
    ],
)
def test_gpt2_blocks_with_other_masks_positions_and_widths(precision, changes, hidden):
    block = GPT2._replace(**changes, mlp_hidden=hidden)
    for injection in INJECTIONS:
        check_block(
            block, precision, n_heads=4, n_layer=2, n_loops=3, window=2, injection=injection
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_wanted_gradients_are_computed_and_they_are_the_same(precision):
    block = TRM._replace(mlp_hidden=96)
    inputs = cast(block_inputs(block, n_layer=2, D=64), torch.float32)
    positions = {k: v.float() for k, v in other_positions(block, 6, 16).items()}
    arguments = {"n_heads": 4, "n_loops": 2, "window": 2, "block": block, "precision": precision}

    def gradients(wanted):
        named = leaves(cast(inputs, torch.float32))
        copies = {name: t.requires_grad_(name in wanted) for name, t in named.items()}
        weights = [copies[f"weights[{i}]"] for i in range(8)]
        e, z = copies["embeddings"], copies["state"]
        states = ops.loop(e, state=z, weights=weights, **positions, **arguments, backend="cpu")
        states.square().sum().backward()
        return {name: t.grad for name, t in copies.items()}

    every = gradients(list(leaves(inputs)))
    for name in every:
        alone = gradients([name])
        assert torch.equal(alone[name], every[name]), name
        assert [k for k, grad in alone.items() if grad is not None] == [name]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sequences_have_the_same_bits_in_any_batch(precision):
    block = TRM._replace(mlp_hidden=96)
    inputs = cast(block_inputs(block, B=40, S=9, D=64), torch.float32)
    positions = {k: v.float() for k, v in other_positions(block, 9, 16).items()}
    arguments = {"n_heads": 4, "n_loops": 3, "window": 1, "block": block, "precision": precision}

    def states(rows):
        batch = {**inputs, "embeddings": inputs["embeddings"][rows], "state": inputs["state"][rows]}
        return ops.loop(**batch, **positions, **arguments, backend="cpu")[0]

    every = states(slice(None))
    for rows in (slice(0, 1), slice(3, 8), slice(39, 40)):
        torch.testing.assert_close(states(rows), every[rows], rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_queries_of_a_block_like_trms_are_those_of_the_reference(precision):
    block = TRM._replace(mlp_hidden=96)
    inputs = cast(block_inputs(block, S=12, D=64), torch.float32)
    positions = {k: v.float() for k, v in other_positions(block, 12, 16).items()}
    arguments = {"n_heads": 4, "n_loops": 2, "window": 1, "block": block}
    seen = torch.tensor([9, 0, 4])
    ours = ops.loop(
        **inputs, **positions, **arguments, seen=seen, precision=precision, backend="cpu"
    )
    exact = ops.loop(**inputs, **positions, **arguments, seen=seen, backend="reference")
    plain = ops.loop(
        **inputs, **positions, **arguments, seen=seen, precision=precision, backend="reference"
    )
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("training", [False, True])
def test_shared_weights_are_packed_once_and_give_the_same_bits(precision, training):
    block = TRM._replace(mlp_hidden=96)
    inputs = cast(block_inputs(block, n_layer=2, D=64), torch.float32)
    positions = {k: v.float() for k, v in other_positions(block, 6, 16).items()}
    if training:
        require_grad(inputs)
    arguments = {"n_heads": 4, "n_loops": 2, "window": 2, "block": block, "precision": precision}
    alone = ops.loop(**inputs, **positions, **arguments, backend="cpu")
    weights = SharedWeights(inputs["weights"])
    shared = [
        ops.loop(**inputs | {"weights": weights}, **positions, **arguments, backend="cpu")
        for _ in range(2)
    ]
    assert len(weights.kept) == 1
    for states in shared:
        assert torch.equal(states, alone)
        if training:
            tensors = list(leaves(inputs).values())
            pairs = zip(
                torch.autograd.grad(states.square().sum(), tensors, retain_graph=True),
                torch.autograd.grad(alone.square().sum(), tensors, retain_graph=True),
                strict=True,
            )
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_shared_weights_of_another_size_are_refused():
    block = TRM._replace(mlp_hidden=96)
    inputs = cast(block_inputs(block, D=64), torch.float32)
    weights = SharedWeights(inputs["weights"])
    arguments = {"n_heads": 4, "n_loops": 1, "window": 1, "backend": "cpu"}
    blocks = block._replace(positions="none")
    ops.loop(**inputs | {"weights": weights}, positions=None, block=blocks, **arguments)
    weights.extend(inputs["weights"])  # now two blocks, but packed as one
    with pytest.raises(ValueError, match=r"packed matrices have \d+ bytes"):
        ops.loop(**inputs | {"weights": weights}, positions=None, block=blocks, **arguments)


def test_the_engines_ops_pass_opcheck_with_a_block_like_trms():
    block = TRM._replace(mlp_hidden=96)
    inputs = cast(block_inputs(block, D=64), torch.float32)
    e, z = inputs["embeddings"].requires_grad_(), inputs["state"]
    weights = [w.requires_grad_() for w in inputs["weights"]]
    tables = other_positions(block, 6, 16)["positions"].float()
    flat = (4, 3, 2, "add", "fp32", "trm", 96, "full", 1e-5)
    for recompute in (False, True):
        torch.library.opcheck(
            torch.ops.looped_fast.cpu_loop_forward.default,
            (e, tables, z, weights, *flat, None, recompute),
        )
    detached = [w.detach() for w in weights]
    torch.library.opcheck(
        torch.ops.looped_fast.cpu_loop_infer.default, (e.detach(), None, z, detached, *flat)
    )
