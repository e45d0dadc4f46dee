"""The Tiny Recursive Model: supervision steps, halting, settings, and refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.func import functional_call

from looped_fast import TinyRecursiveModel, TRMConfig, accelerate, explain_backend, restore
from looped_fast.model import Carry, TRMOutput
from looped_fast.ops import op

SMALL = {
    "vocab_size": 6, "seq_len": 9, "hidden_size": 32, "num_heads": 4, "H_cycles": 2, "L_cycles": 2,
    "halt_max_steps": 5,
}  # fmt: skip
PUZZLES = torch.randint(6, (4, 9), generator=torch.Generator().manual_seed(1))


def build(**changes) -> TinyRecursiveModel:
    torch.manual_seed(0)
    model = TinyRecursiveModel(TRMConfig(**{**SMALL, **changes}))
    torch.nn.init.normal_(model.q_head.weight)
    if model.config.puzzle_emb_ndim:
        torch.nn.init.normal_(model.puzzle_emb.weights)
    return model


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_step_returns_the_carry_for_the_next_without_gradient():
    model = build()
    first = model(PUZZLES)
    assert first.logits.shape == (4, 9, 6)
    assert (first.q_halt.shape, first.q_halt.dtype) == ((4,), torch.float32)
    assert first.logits.requires_grad
    assert not any(z.requires_grad for z in first.carry)
    second = model(PUZZLES, first.carry)
    assert not torch.allclose(second.logits, first.logits)
    assert_equal(model(PUZZLES, model.initial_carry(4)).logits, first.logits)


def test_the_initial_carry_is_the_two_buffers_and_may_be_changed():
    model = build()
    carry = model.initial_carry(3)
    assert_equal(carry.z_H, model.H_init.expand(3, 9, 32))
    assert_equal(carry.z_L, model.L_init.expand(3, 9, 32))
    before = model.H_init.clone()
    carry.z_H[0] = 0
    assert torch.equal(model.H_init, before)


def test_only_the_last_cycle_carries_gradient():
    one, two = build(H_cycles=1), build(H_cycles=2)
    with torch.no_grad():
        between = one(PUZZLES).carry
    for output, model in ((one(PUZZLES, between), one), (two(PUZZLES), two)):
        output.logits.square().mean().backward()
        assert model.L_level.layers[0].mlp.down_proj.weight.grad.norm() > 0
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_equal(a.grad, b.grad)


def test_a_cycle_is_two_calls_of_the_op_and_without_gradient_keeps_no_states(monkeypatch):
    calls, run = [], op.run

    def counted(tensors, settings):
        calls.append((settings.n_loops, settings.window, id(tensors.weights)))
        return run(tensors, settings)

    monkeypatch.setattr(op, "run", counted)
    model = build(L_cycles=3)
    model(PUZZLES)
    assert [call[:2] for call in calls] == [(3, 1), (1, 1), (3, 3), (1, 1)]
    assert len({call[2] for call in calls}) == 1, "one list of weights for a forward"
    calls.clear()
    with torch.no_grad():
        model(PUZZLES)
    assert [call[:2] for call in calls] == [(3, 1), (1, 1), (3, 1), (1, 1)]


def test_nothing_halts_at_first():
    torch.manual_seed(0)
    output = TinyRecursiveModel(TRMConfig(**SMALL))(PUZZLES)
    assert (output.q_halt == -5).all()
    assert (output.q_continue == -5).all()


def test_initial_weights_are_truncated_lecun_normals():
    torch.manual_seed(0)
    model = TinyRecursiveModel(TRMConfig(1000, 9, hidden_size=256, num_heads=4))
    expected = {
        "embed_tokens.embedding_weight": 256, "L_level.layers.1.mlp.down_proj.weight": 768,
        "L_level.layers.0.self_attn.qkv_proj.weight": 256, "lm_head.weight": 256,
    }  # fmt: skip
    for name, fan_in in expected.items():
        weight = model.get_parameter(name).detach() * math.sqrt(fan_in)
        assert abs(weight.std() - 1) < 0.01
        assert abs(weight.mean()) < 0.01
        assert 2.2 < weight.abs().max() <= 2 / 0.8796  # cut at two sigma of what is cut


def test_weights_are_drawn_in_the_public_order():
    """Uniform numbers through the inverse of the normal distribution, module by module."""
    torch.manual_seed(3)
    model = TinyRecursiveModel(TRMConfig(**SMALL, pos_encodings="learned"))
    torch.manual_seed(3)
    normal, edge = torch.distributions.Normal(0, 1), math.erf(2**0.5)
    layers = [f"L_level.layers.{i}.{name}.weight" for i in range(2) for name in (
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
    )]  # fmt: skip
    drawn = ("embed_tokens.embedding_weight", "lm_head.weight", "q_head.weight",
             "embed_pos.embedding_weight", *layers, "H_init", "L_init")  # fmt: skip
    state = model.state_dict()
    for name in drawn:
        uniform = torch.empty_like(state[name]).uniform_(-edge, edge)
        if name != "q_head.weight":  # drawn, then set to 0
            std = 1 if name.endswith("_init") else state[name].shape[-1] ** -0.5
            expected = normal.icdf((uniform.double() + 1) / 2) * std / 0.8796256610342398
            torch.testing.assert_close(state[name], expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "hidden"),
    [((512, 4.0), 1536), ((128, 4.0), 512), ((64, 4.0), 256), ((256, 1.0), 256), ((96, 5.0), 512)],
)
def test_the_hidden_width_is_two_thirds_rounded_up_to_256(settings, hidden):
    config = TRMConfig(6, 9, hidden_size=settings[0], expansion=settings[1], num_heads=1)
    assert config.mlp_hidden == hidden


def test_the_settings_survive_a_dict():
    config = TRMConfig(**SMALL, puzzle_emb_ndim=40, num_puzzle_identifiers=3)
    assert TRMConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        TRMConfig.from_dict({**config.to_dict(), "hiden_size": 3})


# A puzzle's embedding


def test_a_puzzle_embedding_is_put_before_the_puzzle_and_trained():
    model = build(puzzle_emb_ndim=40, num_puzzle_identifiers=3)
    assert model.config.n_tokens == 2 + 9
    ids = torch.tensor([0, 1, 1, 0])
    output = model(PUZZLES, puzzle_identifiers=ids)
    assert output.carry.z_H.shape == (4, 11, 32)
    assert output.logits.shape == (4, 9, 6)
    output.logits.square().mean().backward()
    norms = model.puzzle_emb.weights.grad.norm(dim=1)
    assert norms[0] > 0
    assert norms[1] > 0
    assert norms[2] == 0
    others = model(PUZZLES, puzzle_identifiers=ids + 1)
    assert not torch.allclose(others.logits, output.logits)


def test_a_puzzle_embedding_may_have_more_tokens_than_it_fills():
    model = build(puzzle_emb_ndim=40, puzzle_emb_len=5)
    assert model.config.n_tokens == 5 + 9
    ids = torch.zeros(4, dtype=torch.int32)
    assert model(PUZZLES, puzzle_identifiers=ids).logits.shape == (4, 9, 6)


# Solving


def by_hand(model, steps, inputs=PUZZLES, **given):
    carry, outputs = None, []
    with torch.no_grad():
        for _ in range(steps):
            outputs.append(model(inputs, carry, **given))
            carry = outputs[-1].carry
    return outputs


def test_solve_runs_every_step_by_default():
    model = build()
    solution = model.solve(PUZZLES)
    assert_equal(solution.logits, by_hand(model, 5)[-1].logits)
    assert torch.equal(solution.tokens, solution.logits.argmax(-1))
    assert solution.n_steps.tolist() == [5] * 4
    assert not solution.logits.requires_grad
    assert model.solve(PUZZLES, max_steps=2).n_steps.tolist() == [2] * 4


def test_a_puzzle_that_halts_keeps_its_answer_and_is_not_computed_again():
    model, seen = build(), []
    model.register_forward_hook(lambda m, args, output: seen.append(len(args[0])))
    halts_at = torch.tensor([2, 5, 1, 2])
    marks = PUZZLES.clone()
    marks[:, 0] = torch.arange(4)  # tells the puzzles apart for the criterion
    step = [0]

    def halt(output: TRMOutput):
        step[0] += 1
        left = halts_at[halts_at >= step[0]]
        assert len(output.q_halt) == len(output.logits) == len(left)
        return left == step[0]

    solution = model.solve(marks, halt=halt)
    assert solution.n_steps.tolist() == halts_at.tolist()
    assert seen == [4, 3, 1, 1, 1]
    alone = by_hand(model, 5, marks)
    for i, n in enumerate(halts_at.tolist()):
        assert_equal(solution.logits[i], alone[n - 1].logits[i])


def test_all_puzzles_may_halt_at_once():
    model, calls = build(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    solution = model.solve(PUZZLES, halt=lambda output: output.q_halt == output.q_halt)
    assert (solution.n_steps.tolist(), len(calls)) == ([1] * 4, 1)


def test_halting_by_q_is_where_q_halt_is_above_0():
    model = build()
    with torch.no_grad():
        model.q_head.bias.zero_()
    outputs = by_hand(model, 5)
    halted = torch.stack([output.q_halt > 0 for output in outputs[:4]] + [torch.ones(4) > 0])
    first = halted.int().argmax(0)
    assert len(first.unique()) > 1, "puzzles halt at different steps"
    solution = model.solve(PUZZLES, halt="q")
    assert solution.n_steps.tolist() == (first + 1).tolist()
    for i, step in enumerate(first.tolist()):
        assert_equal(solution.logits[i], outputs[step].logits[i])


def test_solve_keeps_identifiers_with_their_puzzles():
    model = build(puzzle_emb_ndim=32, num_puzzle_identifiers=4)
    ids = torch.arange(4)
    solution = model.solve(
        PUZZLES, halt=lambda output: torch.arange(len(output.q_halt)) == 0, puzzle_identifiers=ids
    )
    assert solution.n_steps.tolist() == [1, 2, 3, 4]
    outputs = by_hand(model, 4, puzzle_identifiers=ids)
    for i in range(4):
        assert_equal(solution.logits[i], outputs[i].logits[i])


def test_no_puzzles_are_solved_at_once():
    solution = build().solve(PUZZLES[:0], halt="q")
    assert solution.tokens.shape == (0, 9)


# Refusals

BAD_CONFIGS = {
    "mlp_t": ({"mlp_t": True}, "mlp_t = True: .*mlp_t=False"),
    "heads": ({"num_heads": 5}, "hidden_size = 32 is not divisible by num_heads = 5"),
    "odd head": ({"num_heads": 32}, "hidden_size / num_heads = 1 is odd.*'learned' or 'none'"),
    "positions": ({"pos_encodings": "rotary"}, "unknown pos_encodings 'rotary'.*rope"),
    "no cycle": ({"H_cycles": 0}, "H_cycles = 0: a whole number of at least 1"),
    "no update": ({"L_cycles": 0}, "L_cycles = 0: a whole number of at least 1"),
    "no layer": ({"L_layers": 0}, "L_layers = 0: a whole number of at least 1"),
    "half a size": ({"hidden_size": 32.0}, "hidden_size = 32.0: a whole number"),
    "expansion": ({"expansion": 0}, "expansion = 0: a number above 0"),
    "eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0: a number above 0"),
    "theta": ({"rope_theta": -1.0}, "rope_theta = -1.0: a number above 0"),
    "exploration": ({"halt_exploration_prob": 1.5}, r"halt_exploration_prob = 1.5 is outside 0..1"),
    "empty tokens": ({"puzzle_emb_len": 2}, "puzzle_emb_len = 2, but puzzle_emb_ndim = 0"),
    "too few tokens": (
        {"puzzle_emb_len": 2, "puzzle_emb_ndim": 65}, "2 tokens of 32 can't hold .* = 65",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_bad_setting_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TRMConfig(**{**SMALL, **changes})


CARRY = torch.zeros(4, 9, 32)
BAD_CALLS = {
    "token above": ((PUZZLES + 1,), ValueError, r"inputs hold 6, outside 0\.\.5: .*vocab_size"),
    "token below": ((PUZZLES - 1,), ValueError, r"inputs hold -1, outside 0\.\.5"),
    "shorter": ((PUZZLES[:, :8],), ValueError, r"shape \(4, 8\); \[B, 9\] is needed .seq_len."),
    "one puzzle": ((PUZZLES[0],), ValueError, r"shape \(9,\); \[B, 9\]"),
    "floats": ((PUZZLES.float(),), ValueError, r"inputs are torch.float32; convert .*long"),
    "bools": ((PUZZLES > 2,), ValueError, r"inputs are torch.bool; convert"),
    "list": (([[1] * 9],), TypeError, "inputs is a list; a torch.Tensor"),
    "carry of others": (
        (PUZZLES[:2], Carry(CARRY, CARRY)), ValueError,
        r"carry.z_H has shape \(4, 9, 32\); \(2, 9, 32\) is needed .*initial_carry\(2\)",
    ),
    "narrow z_L": ((PUZZLES, Carry(CARRY, CARRY[..., :16])), ValueError, "carry.z_L has shape"),
    "carry in bf16": (
        (PUZZLES, Carry(CARRY, CARRY.bfloat16())), ValueError, "carry.z_L is torch.bfloat16",
    ),
    "an output": ((PUZZLES, TRMOutput(CARRY, CARRY, CARRY, CARRY)), TypeError, "a Carry is needed"),
    "a tensor": ((PUZZLES, CARRY), TypeError, "carry is a Tensor; a Carry is needed"),
    "no tensors": ((PUZZLES, Carry(CARRY, None)), TypeError, "z_L is a NoneType"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "kind", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_bad_argument_is_refused_by_name(args, kind, message):
    with pytest.raises(kind, match=message):
        build()(*args)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "puzzle_identifiers are missing, but puzzle_emb_ndim = 32"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\); \[4\] is needed"),
        (torch.full((4,), 2), r"puzzle_identifiers hold 2, outside 0\.\.1: .*num_puzzle"),
        (torch.zeros(4), "puzzle_identifiers are torch.float32; convert"),
    ],
)
def test_bad_identifiers_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        build(puzzle_emb_ndim=32, num_puzzle_identifiers=2)(PUZZLES, puzzle_identifiers=ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halt": "always"}, "unknown halt 'always'.*never, q"),
        ({"halt": lambda output: output.q_halt}, r"halt returned a torch.float32; a bool tensor"),
        ({"halt": lambda output: True}, "halt returned a bool; a bool tensor"),
        ({"halt": lambda output: output.logits > 0}, r"halt returned shape \(4, 9, 6\); \(4,\)"),
        ({"max_steps": 0}, "max_steps = 0: at least 1"),
    ],
)
def test_bad_options_of_solve_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build().solve(PUZZLES, **options)


def test_bad_options_of_the_model_are_refused():
    with pytest.raises(TypeError, match=r"config = {}: a TRMConfig is needed"):
        TinyRecursiveModel({})
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        TinyRecursiveModel(TRMConfig(**SMALL), backend="cuda")
    with pytest.raises(ValueError, match="batch_size = -1"):
        build().initial_carry(-1)


# Around the model


def test_any_integer_dtype_will_do():
    model = build()
    expected = model(PUZZLES).logits
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(model(PUZZLES.to(dtype)).logits, expected)


def test_autocast_lowers_products_but_not_states_or_results():
    model = build()
    exact = model(PUZZLES)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(PUZZLES)
        model(PUZZLES, Carry(*(z.bfloat16() for z in lowered.carry)))  # which autocast casts
    assert lowered.logits.dtype == lowered.carry.z_H.dtype == torch.float32
    assert 1e-5 < (lowered.logits - exact.logits).norm() / exact.logits.norm() < 0.1


def test_accelerate_sets_precision_and_backend_and_restore_puts_them_back():
    model = build()
    exact = model(PUZZLES).logits
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(PUZZLES).logits
    accelerate(model, backend="reference", precision="bf16")
    assert torch.equal(model(PUZZLES).logits, expected)
    assert explain_backend(model, 4).chosen == "reference"
    assert torch.equal(restore(model)(PUZZLES).logits, exact)


def test_explain_backend_knows_the_length_of_the_puzzles():
    model = build(puzzle_emb_ndim=64)
    call = model.describe_call(4)
    assert (call.batch, call.seq_len, call.n_embd, call.n_layer) == (4, 11, 32, 2)
    assert explain_backend(model, 4).chosen == explain_backend(model, 4, 9).chosen
    with pytest.raises(ValueError, match=r"n_points = 8, but .* seq_len = 9"):
        explain_backend(model, 4, 8)


def test_a_copy_and_a_pickle_compute_the_same():
    model = build()
    expected = model(PUZZLES).logits
    assert torch.equal(copy.deepcopy(model)(PUZZLES).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(PUZZLES).logits, expected)


def test_a_graph_of_torch_compile_has_no_breaks():
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(PUZZLES).logits, model(PUZZLES).logits)
    assert_equal(compiled(PUZZLES, model.initial_carry(4)).q_halt, model(PUZZLES).q_halt)


def test_functional_calls_and_transforms_see_their_parameters():
    model = build().double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return functional_call(model, parameters, (PUZZLES,)).logits.square().mean()

    direct = model(PUZZLES).logits.square().mean()
    gradients = torch.autograd.grad(direct, list(model.parameters()), allow_unused=True)
    for (name, found), expected in zip(
        torch.func.grad(loss)(parameters).items(), gradients, strict=True
    ):
        torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)
        assert name.startswith("q_head") == (expected is None)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, forward = torch.func.jvp(loss, (parameters,), (tangents,))
    expected = sum((g * 1.0).sum() for g in gradients if g is not None)
    torch.testing.assert_close(forward, expected)


def test_a_model_on_the_meta_device_takes_no_memory():
    with torch.device("meta"):
        model = TinyRecursiveModel(TRMConfig(**SMALL, puzzle_emb_ndim=32))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
