"""``accelerate`` on the public Tiny Recursive Model's structure, and on what only looks like it."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import foreign_trm as foreign
import pytest
import torch
from foreign_trm import Config
from torch import nn
from torch.nn.utils import prune

from looped_fast import UnsupportedModel, accelerate, explain_backend, restore
from looped_fast.ops import op

GENERATOR = torch.Generator().manual_seed(1)
BATCH = {
    "inputs": torch.randint(7, (4, 9), generator=GENERATOR),
    "puzzle_identifiers": torch.tensor([0, 3, 1, 1]),
}
PUZZLE = {"puzzle_emb_ndim": 40}
KINDS = {
    "rotary": {},
    "learned": {"pos_encodings": "learned"},
    "no positions": {"pos_encodings": "none"},
    "one cycle": {"H_cycles": 1, "L_cycles": 1, "L_layers": 1},
    "many cycles": {"H_cycles": 3, "L_cycles": 6},
    "puzzle embeddings": PUZZLE,
    "another eps": {"norm_eps": 1e-3},
}


def build(make=foreign.Outer, **settings):
    torch.manual_seed(0)
    return make(Config(**settings))


def double(model):
    model.double()
    if hasattr(model.inner, "puzzle_emb"):  # whose copy of rows is a leaf of the graph
        embedding = model.inner.puzzle_emb
        embedding.local_weights = embedding.local_weights.detach().requires_grad_()


def inner_of(model):
    return getattr(model, "inner", model)


def layer_of(model):
    return inner_of(model).L_level.layers[0]


def train(model, steps=4):
    """Outputs, carries, and gradients of some supervision steps, in which puzzles halt."""
    carry, results = model.initial_carry(BATCH), []
    for _ in range(steps):
        carry, outputs = model(carry, BATCH)
        (outputs["logits"].square().mean() + outputs["q_halt_logits"].mean()).backward()
        results += [*outputs.values(), carry.inner_carry.z_H, carry.inner_carry.z_L, carry.halted]
    gradients = [p.grad for p in model.parameters()]
    if hasattr(model.inner, "puzzle_emb"):
        local = model.inner.puzzle_emb.local_weights
        gradients.append(local.grad.clone())
        local.grad = None
    model.zero_grad()
    return [t.detach() for t in results], gradients


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_stays_the_same(settings, dtype):
    model = build(**settings, forward_dtype=dtype)
    if dtype == "float64":
        double(model)
    results, gradients = train(model)
    assert accelerate(model) is model
    calls = model.inner.calls
    fast_results, fast_gradients = train(model)
    assert model.inner.calls == calls, "the model's own forward ran"
    near = {"rtol": 1e-9, "atol": 1e-10} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(fast_results, results, **near)
    torch.testing.assert_close(fast_gradients, gradients, **near)


def test_evaluation_stays_the_same_and_keeps_no_states(monkeypatch):
    model = build(**PUZZLE).eval()
    expected = train_free(model)
    windows, run = [], op.run
    accelerate(model)
    monkeypatch.setattr(op, "run", lambda t, s: windows.append(s.window) or run(t, s))
    torch.testing.assert_close(train_free(model), expected, rtol=1e-4, atol=1e-5)
    assert set(windows) == {1}


@torch.no_grad()
def train_free(model):
    carry, outputs = model(model.initial_carry(BATCH), BATCH)
    return [*outputs.values(), carry.inner_carry.z_H]


def test_the_inner_model_may_be_accelerated_alone():
    model = build()
    expected, _ = train(model)
    accelerate(model.inner)
    assert explain_backend(model, 4).chosen == explain_backend(model.inner, 4).chosen
    torch.testing.assert_close(train(model)[0], expected, rtol=1e-4, atol=1e-4)
    restore(model)
    assert "forward" not in vars(model.inner)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(model.inner)


def test_restore_leaves_no_trace():
    model = build(**PUZZLE)
    before = dict(vars(model)), dict(vars(model.inner)), dict(vars(model.inner.L_level))
    restore(accelerate(model))
    assert (vars(model), vars(model.inner), vars(model.inner.L_level)) == before


def test_verifying_changes_nothing_that_the_optimizer_of_embeddings_reads():
    model = build(**PUZZLE)
    train(model, 1)
    embedding = model.inner.puzzle_emb
    before = {name: buffer.clone() for name, buffer in embedding.named_buffers()}
    accelerate(model)
    assert all(torch.equal(b, before[name]) for name, b in embedding.named_buffers())


def test_sparse_embeddings_train_for_many_steps_on_the_fast_path():
    model = accelerate(build(**PUZZLE))
    carry = model.initial_carry(BATCH)
    for step in range(12):  # more than the states that are verified
        ids = (torch.arange(4) + step) % 5
        carry, outputs = model(carry, {**BATCH, "puzzle_identifiers": ids})
        outputs["logits"].square().mean().backward()
    assert model.inner.calls == 0
    assert model.inner.puzzle_emb.local_weights.grad.norm() > 0


def assert_dtypes_are_those_of_its_own_forward(model, run):
    own = [t.dtype for t in run(model)]
    assert [t.dtype for t in run(accelerate(model))] == own


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_carries_and_outputs_have_the_forward_dtype(dtype):
    assert_dtypes_are_those_of_its_own_forward(
        build(forward_dtype=dtype), lambda model: train(model)[0]
    )


def test_a_carry_of_another_dtype_is_promoted_as_by_its_own_forward():
    def run(model):
        carry = model.reset_carry(torch.ones(4) > 0, model.empty_carry(4))
        wide = foreign.InnerCarry(carry.z_H.float(), carry.z_L)
        after, logits, q = model(wide, BATCH)
        return [after.z_H, after.z_L, logits, *q]

    assert_dtypes_are_those_of_its_own_forward(build(foreign.Inner, forward_dtype="bfloat16"), run)


def test_bf16_is_as_near_to_float32_as_its_own_forward():
    exact, lowered = build(hidden_size=64), build(hidden_size=64, forward_dtype="bfloat16")
    for name, buffer in lowered.inner.named_buffers():
        exact.inner.get_buffer(name).copy_(buffer)
    lowered.load_state_dict(exact.state_dict())
    (truth, true_gradients), (own, own_gradients) = train(exact, 1), train(lowered, 1)
    fast, fast_gradients = train(accelerate(lowered), 1)
    assert lowered.inner.calls == 1

    def error(a, b):
        return (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6)

    floor = 4 * torch.finfo(torch.float32).eps
    for t, a, b in zip(truth, own, fast, strict=True):
        assert error(b, t) <= 2 * error(a, t) + floor
    for t, a, b in zip(true_gradients, own_gradients, fast_gradients, strict=True):
        assert error(b, t) <= 3 * error(a, t) + floor


def test_autocast_and_precision_lower_products_alone():
    model = accelerate(build())
    exact = train_free(model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        lowered = train_free(model)
    accelerate(model, precision="bf16")
    asked = train_free(model)
    torch.testing.assert_close(asked, lowered, rtol=0, atol=0)
    assert lowered[-1].dtype == torch.float32
    assert 1e-4 < (lowered[-1] - exact[-1]).norm() / exact[-1].norm() < 0.2
    torch.testing.assert_close(train_free(accelerate(model, precision="fp32")), exact)


def test_explain_backend_describes_the_loop():
    model = accelerate(build(**PUZZLE, forward_dtype="bfloat16"))
    call = model.inner.forward.describe_call(4)
    assert (call.batch, call.seq_len, call.n_embd, call.n_layer) == (4, 2 + 9, 32, 2)
    assert (call.settings.precision, call.dtype) == ("bf16", torch.float32)
    assert call.settings.block.mlp_hidden == 48
    explain_backend(model, 4, 9)
    with pytest.raises(ValueError, match=r"n_points = 11, but .*seq_len = 9"):
        explain_backend(model, 4, 11)
    with pytest.raises(ValueError, match="a Outer runs its own code"):
        explain_backend(build(), 4)


def test_copies_and_pickles_stay_fast():
    model = accelerate(build())
    expected = train_free(model.eval())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(train_free(other), expected, rtol=0, atol=0)
        assert other.inner.calls == 0
        assert other.inner.forward.model is other.inner


# Lookalikes

LOOKALIKES = {
    "causal": "L_level.layers.0 is not full attention",
    "scale": "L_level.layers.0 is not full attention",
    "look": "L_level is not its blocks in turn",
    "bias": "L_level.layers.0 is not full attention",
    "act": "L_level.layers.0 is not full attention .*then SwiGLU",
    "norm_before": "L_level.layers.0 is not .*each followed by RMSNorm",
    "true_eps": "L_level.layers.0 is not .*RMSNorm with eps 1e-05",
    "eps_grows": r"its blocks differ in norm_eps: 1e-05, 2e-05",
    "detach": "gradients differ",
    "weak": "L_level is not its blocks in turn on the sum",
    "all_gradients": "its forward is not TinyRecursive.*gradients differ",
    "answer_first": "its forward is not TinyRecursive",
    "more": "its forward is not TinyRecursive",
    "e_to_H": "its forward is not TinyRecursive",
    "reads_z_L": "its forward is not TinyRecursive",
    "q_last": "its forward is not TinyRecursive",
    "attached": "its forward is not TinyRecursive.*gradients differ",
}
VALUES = {"scale": 0.3, "look": 7, "act": "gelu", "true_eps": 1e-6}


@pytest.mark.filterwarnings("ignore:Inner runs its own forward")
@pytest.mark.parametrize(("quirk", "reason"), LOOKALIKES.items(), ids=LOOKALIKES.keys())
def test_a_lookalike_is_refused_by_what_differs(quirk, reason):
    quirks = {"more": 1} if quirk == "more" else {"quirks": {quirk: VALUES.get(quirk, 1)}}
    model = build(**quirks)
    if quirk == "eps_grows":  # an attribute, which may be set right later
        expected = train(model)[0]
        assert explain_backend(accelerate(model), 4).chosen == "reference"
        torch.testing.assert_close(train(model)[0], expected, rtol=0, atol=0)
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(explain_backend(model, 4).reasons["cpu"])
        return
    with pytest.raises(UnsupportedModel, match=reason):
        accelerate(model)
    assert "forward" not in vars(model.inner)
    assert "forward" not in vars(model.inner.L_level)


def test_mlp_t_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"mlp_t = True: .* train with mlp_t=False"):
        accelerate(build(mlp_t=True))


def test_a_model_around_it_is_told_which_part_to_accelerate():
    with pytest.raises(UnsupportedModel, match=r"accelerate\(model\.model\)"):
        accelerate(foreign.Loss(build()))


def test_a_model_with_a_second_network_is_none_of_ours():
    model = build()
    model.inner.H_level = copy.deepcopy(model.inner.L_level)
    with pytest.raises(UnsupportedModel, match="the structure of none of"):
        accelerate(model)


@pytest.mark.parametrize("name", ["q_head", "empty_carry", "config.L_cycles"])
def test_a_missing_attribute_is_named(name):
    model = build(foreign.Inner)
    kind = type("Less", (foreign.Inner,), {})
    if name == "empty_carry":
        kind.empty_carry = property(lambda self: self.gone)
        model.__class__ = kind
    elif name == "q_head":
        del model.q_head
    else:
        settings = vars(model.config)
        model.config = SimpleNamespace(**{k: settings[k] for k in settings if k != "L_cycles"})
    with pytest.raises(UnsupportedModel, match=f"it has no {name}"):
        accelerate(model)


# Changes after accelerate


class Halving(nn.Module):
    def forward(self, x):
        return x / 2


def dropout(model):
    layer_of(model).drop = nn.Dropout(0.5)


CHANGES = {
    "hook": (lambda m: layer_of(m).mlp.register_forward_hook(lambda m, a, o: 2 * o),
             "L_level.layers.0.mlp has a forward_hook"),
    "hook on L_level": (lambda m: m.inner.L_level.register_forward_hook(lambda m, a, o: 2 * o),
                        "L_level has a forward_hook"),
    "pruning": (lambda m: prune.l1_unstructured(layer_of(m).self_attn.qkv_proj, "weight", 0.5),
                "L_level.layers.0.self_attn.qkv_proj has a forward_pre_hook"),
    "another activation": (lambda m: setattr(layer_of(m).mlp, "act", "gelu"), "is not full"),
    "causal": (lambda m: setattr(layer_of(m).self_attn, "causal", True), "is not full"),
    "another module": (lambda m: setattr(layer_of(m), "drop", Halving()), "is not full"),
    "dropout": (dropout, "L_level.layers.0.drop drops out with p = 0.5"),
    "a schedule of its own": (lambda m: setattr(m.config, "more", 1), "its forward is not"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Inner runs its own forward")
@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_after_accelerate_is_in_force_and_named(change, named):
    model, changed = accelerate(build()), build()
    before = train(model)[0]
    change(changed)
    change(model)
    torch.manual_seed(2)
    expected, expected_gradients = train(changed)
    torch.manual_seed(2)
    results, gradients = train(model)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0], before[0], rtol=1e-3)
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(explain_backend(model, 4).reasons["cpu"])


def test_it_is_said_once_and_the_fast_path_comes_back():
    model = accelerate(build())
    hook = layer_of(model).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"Inner runs its own forward: L_level\.layers\.0 has a"):
        train(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 1)
        hook.remove()
        train(model, 1)
    assert model.inner.calls == 2


@pytest.mark.parametrize("name", ["embed_tokens", "rotary_emb", "lm_head", "q_head", "puzzle_emb"])
def test_hooks_on_embeddings_and_heads_run_on_the_fast_path(name):
    model, seen = accelerate(build(**PUZZLE)), []
    expected = train(model, 1)[0]
    model.inner.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(train(model, 1)[0], expected, rtol=0, atol=0)
    assert (len(seen), model.inner.calls) == (1, 0)


def test_settings_of_the_schedule_are_read_at_every_call():
    model, other = accelerate(build()), build(H_cycles=3, L_cycles=2)
    model.config.H_cycles, model.config.L_cycles = 3, 2
    torch.testing.assert_close(train(model)[0], train(other)[0], rtol=1e-4, atol=1e-4)
    assert model.inner.calls == 0


def test_tables_that_are_replaced_or_changed_are_used():
    model, other = accelerate(build()), build()
    train(model, 1)
    for change in (
        lambda m: m.inner.rotary_emb.cos_cached.mul_(0.5),
        lambda m: setattr(m.inner, "rotary_emb", foreign.Rotary(8, 9)),
    ):
        for each in (model, other):
            change(each)
        torch.testing.assert_close(train(model)[0], train(other)[0], rtol=1e-4, atol=1e-4)
    assert model.inner.calls == 0


def test_a_forced_backend_is_refused_while_a_module_deviates():
    model = accelerate(build(), backend="compiled")
    layer_of(model).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"backend 'compiled' can't run this: .*forward_hook"):
        train(model)


def test_a_graph_of_torch_compile_has_no_breaks():
    model = accelerate(build(foreign.Inner))
    carry = model.reset_carry(torch.ones(4) > 0, model.empty_carry(4))
    expected = model(carry, BATCH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(carry, BATCH)[1], expected[1], rtol=1e-4, atol=1e-5)
