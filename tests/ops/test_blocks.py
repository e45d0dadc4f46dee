"""``Block`` settings of the op: the reference takes all, others name what they do not take."""

from __future__ import annotations

import pytest
import torch
from block_cases import all_blocks, block_inputs, naive_step, other_positions, rotary_tables
from conftest import CALL, changed, leaves, require_grad

from looped_fast import ops
from looped_fast.ops import backends, cpu_engine, triton_backend
from looped_fast.ops.block import GPT2, TRM, Block, block_names, final_names, unlike
from looped_fast.ops.call import SCHEMA_GPT2, LoopSettings, SharedWeights

TRM_CALL = changed(CALL, block=TRM._replace(mlp_hidden=768))


def test_the_reference_computes_every_block():
    n = 0
    for block in all_blocks():
        inputs = require_grad(block_inputs(block, n_layer=2))
        positions = {"positions": None} | inputs | other_positions(block, 6, 8)
        arguments = {"n_heads": 2, "n_loops": 2, "window": 2, "block": block}
        states = ops.loop(**{**inputs, **positions}, **arguments, backend="reference")
        expected = z = inputs["state"]
        steps = []
        for _ in range(2):
            e, w = inputs["embeddings"], inputs["weights"]
            z = naive_step(z, e, positions["positions"], w, 2, block)
            steps.append(z)
        expected = torch.stack(steps)
        torch.testing.assert_close(states, expected, rtol=1e-11, atol=1e-11, msg=str(block))
        direction = torch.randn_like(expected)
        tensors = list(leaves(inputs).values())
        pairs = zip(
            torch.autograd.grad(states, tensors, direction),
            torch.autograd.grad(expected, tensors, direction),
            strict=True,
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=str(block))
        n += 1
    assert n == 2 * 2 * 2 * 3 * 2 * 2 * 3 * 2 * 2


def test_names_are_as_many_as_the_counts_say():
    for block in all_blocks():
        assert len(block_names(block)) == block.n_block_weights, block
        assert len(final_names(block)) == block.n_final_weights, block
        for n_layer in (1, 3):
            n = n_layer * block.n_block_weights + block.n_final_weights
            assert block.n_layer(n) == block.n_layer(n + 2) == n_layer, block
            assert [block.has_read_out(n), block.has_read_out(n + 2)] == [False, True], block


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"norm": "batch_norm"}, "norm 'batch_norm'"),
        ({"norm_place": "between"}, "norm_place 'between'"),
        ({"mlp": "relu"}, "mlp 'relu'"),
        ({"mask": "local"}, "mask 'local'"),
        ({"positions": "alibi"}, "positions 'alibi'"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0: a number above 0"),
        ({"norm_eps": float("nan")}, "norm_eps = nan: a number above 0"),
        ({"mlp_hidden": 0}, "mlp_hidden = 0: a width of at least 1"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    inputs = block_inputs(GPT2)
    with pytest.raises(ValueError, match=message):
        ops.loop(**inputs, n_heads=2, n_loops=1, window=1, block=GPT2._replace(**setting))


@pytest.mark.parametrize(
    ("positions", "found", "message"),
    [
        ("none", torch.zeros(6, 16), "positions are given, but the block's are 'none'"),
        ("learned", None, "positions are None, but the block's are 'learned'"),
        ("rotary", None, "positions are None, but the block's are 'rotary'"),
        ("rotary", torch.zeros(6, 16), r"positions has shape \(6, 16\); \(2, 6, 8\) is needed"),
        ("learned", torch.zeros(2, 6, 8), r"shape \(2, 6, 8\); \(6, 16\) is needed"),
    ],
)
def test_positions_must_suit_the_block(positions, found, message):
    block = TRM._replace(positions=positions, mlp_hidden=24)
    inputs = block_inputs(block, dtype=torch.float32) | {"positions": found}
    with pytest.raises(ValueError, match=message):
        ops.loop(**inputs, n_heads=2, n_loops=1, window=1, block=block)


def test_rotary_tables_have_no_gradient():
    inputs = block_inputs(TRM) | {"positions": rotary_tables(6, 8).requires_grad_()}
    with pytest.raises(ValueError, match=r"rotary tables, which have no gradient; detach\(\)"):
        ops.loop(**inputs, n_heads=2, n_loops=1, window=1, block=TRM)


def test_rotary_positions_need_pairs():
    inputs = block_inputs(TRM, D=15) | {"positions": torch.zeros(2, 6, 5)}
    with pytest.raises(ValueError, match="head_dim = 5 is odd; rotary positions turn pairs"):
        ops.loop(**inputs, n_heads=3, n_loops=1, window=1, block=TRM)


def test_weights_are_checked_by_the_names_of_the_block():
    inputs = block_inputs(TRM) | {"positions": rotary_tables(6, 8)}
    arguments = {"n_heads": 2, "n_loops": 1, "window": 1, "block": TRM}
    with pytest.raises(ValueError, match="3 weights; 4 per block and 0 for the final norm"):
        ops.loop(**inputs | {"weights": inputs["weights"][:3]}, **arguments)
    inputs["weights"][2] = inputs["weights"][2][:64]
    with pytest.raises(ValueError, match=r"block 0 c_fc_weight has shape .*\(128, 16\) is needed"):
        ops.loop(**inputs, **arguments)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_settings_that_a_backend_does_not_take_are_named(backend):
    unsupported = {"cpu": cpu_engine, "triton": triton_backend}[backend].unsupported
    for block in all_blocks():
        block = block._replace(mlp_hidden=768, norm_eps=1e-5)
        free = ("mask", "positions", "mlp_hidden")
        reason = unsupported(changed(CALL, block=block))
        if reason is None:
            assert unlike(block, [GPT2, TRM], free) is None, block
        elif unlike(block, [GPT2, TRM], free):
            named = [n for n, v in block._asdict().items() if f"{n} = {v!r}" in reason]
            assert named, (block, reason)
            # With these settings changed it would be a block that the backend takes.
            assert unlike(block, [GPT2, TRM], {*free, *named}) is None, (block, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_place": "both"}, "norm_place = 'both'"),
        ({"norm_weight": True}, "norm_weight = True"),
        ({"norm": "layer_norm"}, "norm = 'layer_norm'"),
        ({"mlp": "gelu"}, "mlp = 'gelu'"),
        ({"bias": True}, "bias = True"),
        ({"final_norm": True}, "final_norm = True"),
        ({"mlp_hidden": 100}, "mlp_hidden = 100 is not a multiple of 32"),
    ],
)
@pytest.mark.skipif(cpu_engine.load_error() is not None, reason="no CPU engine")
def test_the_engine_names_what_keeps_it_from_a_block_near_trms(changes, reason):
    block = TRM_CALL.settings.block._replace(**changes)
    selection = backends.explain(changed(TRM_CALL, block=block))
    assert selection.chosen == "reference"
    assert reason in selection.reasons["cpu"]
    with pytest.raises(ValueError, match=reason):
        backends.explain(changed(TRM_CALL, block=block, backend="cpu"))


def test_heads_that_the_engine_can_not_rotate_are_named():
    call = changed(TRM_CALL, n_heads=2)
    assert "takes head_dim 8, 16, 32 or 64, not 128" in cpu_engine.unsupported(call)
    assert cpu_engine.unsupported(changed(call, block=TRM._replace(positions="none"))) is None
    rotary = changed(CALL, block=GPT2._replace(positions="rotary"))
    assert "positions = 'rotary' and bias = True" in cpu_engine.unsupported(rotary)


def test_settings_of_gpt2_are_the_defaults_of_the_schema():
    assert LoopSettings(2, 1, 1).block is GPT2
    for name, value in GPT2._asdict().items():
        assert f" block_{name}={value!r}" in SCHEMA_GPT2
    settings = LoopSettings(2, 3, 1, block=TRM._replace(mlp_hidden=7))
    assert LoopSettings.from_flat(settings.flat()) == settings


def test_shared_weights_are_a_list_that_keeps_nothing_yet():
    weights = SharedWeights([torch.zeros(2)])
    assert weights.kept == {}
    assert isinstance(weights, list)


def test_the_op_with_another_block_passes_opcheck_and_compiles():
    block = TRM._replace(mlp_hidden=24)
    inputs = require_grad(block_inputs(block, dtype=torch.float32))
    tables = rotary_tables(6, 8, torch.float32)
    settings = LoopSettings(2, 3, 2, block=block)
    e, z, w = inputs["embeddings"], inputs["state"], inputs["weights"]
    torch.library.opcheck(
        torch.ops.looped_fast.loop.default, (e, tables, z, w, [], *settings.flat())
    )

    def loss(e, w):
        arguments = {"n_heads": 2, "n_loops": 3, "window": 2, "block": block}
        return ops.loop(e, tables, z, w, **arguments).square().mean()

    expected = torch.autograd.grad(loss(e, w), [e, *w])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(e, w), [e, *w]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_block_is_a_record_of_eleven_settings():
    assert Block() == GPT2
    assert len(Block._fields) == 11
