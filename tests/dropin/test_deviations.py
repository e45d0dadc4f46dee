"""An accelerated model runs its own forward while a module of it computes something else."""

from __future__ import annotations

import copy
import warnings

import foreign_models as foreign
import pytest
import torch
from foreign_models import Lora, Settings
from test_dropin import PROMPT, TOKENS, build
from torch import nn
from torch.nn.utils import parametrize, prune

from looped_fast import UnsupportedModel, accelerate, explain_backend, restore

FAST = (*PROMPT, 1, 3)
BLOCK = "_backbone.transformer.h.0"


def block_of(model):
    return model._backbone.transformer.h[0]


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def wrap(model):
    block_of(model).mlp.c_fc = Lora(block_of(model).mlp.c_fc)


def unwrap(model):
    block_of(model).mlp.c_fc = block_of(model).mlp.c_fc.base


class Other(nn.Module):
    """A module of another structure, in place of one that is known."""

    def __init__(self, width=32):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, add_inputs_embeds=False):
        return self.linear(x)


def set_norm(model):
    model._backbone.transformer.ln_f = nn.RMSNorm(32)


# A change after or before accelerate -> how to undo it, and what is named.
CHANGES = {
    "wrapper": (wrap, unwrap, rf"{BLOCK}\.mlp\.c_fc is a .*Lora, not torch\.nn\.Linear"),
    "pruning": (
        lambda m: prune.random_unstructured(block_of(m).attn.c_attn, "weight", amount=0.5),
        lambda m: prune.remove(block_of(m).attn.c_attn, "weight"),
        rf"{BLOCK}\.attn\.c_attn has a forward_pre_hook",
    ),
    "parametrization": (
        lambda m: parametrize.register_parametrization(block_of(m).mlp.c_proj, "weight", Halved()),
        lambda m: parametrize.remove_parametrizations(block_of(m).mlp.c_proj, "weight", False),
        rf"{BLOCK}\.mlp\.c_proj is parametrized",
    ),
    "read-in": (
        lambda m: setattr(m, "_read_in", Lora(m._read_in)),
        lambda m: setattr(m, "_read_in", m._read_in.base),
        r"_read_in is a .*Lora, not torch\.nn\.Linear",
    ),
    "forward of its own": (
        lambda m: setattr(block_of(m).attn, "forward", lambda x: x / 2),
        lambda m: delattr(block_of(m).attn, "forward"),
        rf"{BLOCK}\.attn has a forward of its own",
    ),
}
# A setting flipped after accelerate.
FLAGS = {
    "causal": lambda m: setattr(block_of(m).attn.settings, "causal", False),
    "scale": lambda m: setattr(block_of(m).attn.settings, "scale", 1.0),
    "activation": lambda m: setattr(block_of(m).mlp, "gelu", "none"),
    "eps": lambda m: setattr(m._backbone.transformer.ln_f, "eps", 1e-3),
    "norm": set_norm,
    "mlp": lambda m: setattr(block_of(m), "mlp", Other()),
    "attention": lambda m: setattr(block_of(m), "attn", Other()),
    "block": lambda m: m._backbone.transformer.h.__setitem__(0, Other()),
    "backbone": lambda m: setattr(m, "_backbone", Other()),
    "heads of one block": lambda m: setattr(m._backbone.transformer.h[1].attn, "n_head", 8),
}


def looped():
    return build(foreign.Looped, settings=Settings(n_layer=2))


def results(model, forward):
    model.zero_grad()
    torch.manual_seed(1)
    predictions = forward(*FAST)
    sum(p.square().mean() for p in predictions).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return predictions, gradients


def assert_own(model):
    own = results(model, lambda *args: type(model).forward(model, *args))
    torch.testing.assert_close(results(model, model), own, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Looped runs its own forward")
@pytest.mark.parametrize(("change", "undo", "named"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_module_is_in_force_until_it_is_gone(change, undo, named, when):
    model = looped()
    if when == "after":
        accelerate(model)
    change(model)
    if when == "before":
        accelerate(model)
    calls = model.calls
    assert_own(model)
    assert model.calls == calls + 2
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(*FAST), looped()(*FAST))
    selection = explain_backend(model, 3, 7)
    assert selection.chosen == "reference"
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(selection.reasons["cpu"])
    undo(model)
    calls = model.calls
    model(*FAST)
    assert model.calls == calls, "the fast path is not back"
    assert explain_backend(model, 3, 7).chosen != "reference"


@pytest.mark.filterwarnings("ignore:Looped runs its own forward")
@pytest.mark.parametrize("flip", FLAGS.values(), ids=FLAGS.keys())
def test_a_setting_that_is_flipped_is_in_force(flip):
    model = accelerate(looped())
    before = model(*FAST)
    assert model.calls == 0
    flip(model)
    assert_own(model)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(*FAST), before)
    assert explain_backend(model, 3, 7).chosen == "reference"


def test_a_flipped_setting_that_changes_no_result_stays_fast():
    model = accelerate(looped())
    block_of(model).attn.settings.positions = 5
    model.note = "an attribute of the user's"
    model(*FAST)
    assert model.calls == 0


def test_settings_that_the_fast_forward_reads_are_read_at_every_call():
    model = accelerate(looped())
    model.loop_func = "z=f(x*z)"
    assert_own(model)
    model.ind = 1
    assert_own(model)
    assert model.calls == 2, "its own forward ran in the fast call"


@pytest.mark.filterwarnings("ignore:Looped runs its own forward")
@pytest.mark.parametrize(
    "name", [f"{BLOCK}.mlp.c_fc", f"{BLOCK}.attn", "_backbone", "_read_in", "_read_out"]
)
def test_hooks_run_with_the_modules_values(name):
    model, seen = accelerate(looped()), []
    expected = model(*FAST)
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, o: seen.append((a, o)))
    torch.testing.assert_close(model(*FAST), expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == {"_read_in": 1, "_read_out": 2}.get(name, 3)
    handle.remove()
    model(*FAST)
    assert len(seen) == {"_read_in": 1, "_read_out": 2}.get(name, 3)


def test_dropout_runs_while_training_and_is_said_once():
    model = build(foreign.GPT, settings=Settings(p=0.5))
    with pytest.warns(UserWarning, match=r"GPT runs its own forward: transformer\.drop drops out"):
        accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])
        model.eval()
        assert torch.equal(model(TOKENS)[0], model(TOKENS)[0])
    assert explain_backend(model, 2, 6).chosen != "reference"
    model.train()
    assert "drops out with p = 0.5 while training" in explain_backend(model, 2, 6).reasons["cpu"]


def test_dropout_put_in_runs():
    model = accelerate(looped())
    block_of(model).attn.attn_dropout = nn.Dropout(0.5)
    with pytest.warns(UserWarning, match=r"attn_dropout drops out with p = 0\.5"):
        first = model(*FAST)
    assert not torch.equal(first[0], model(*FAST)[0])


@pytest.mark.filterwarnings("ignore:GPT runs its own forward")
def test_what_differs_while_training_only_runs_fast_in_eval_mode():
    model = build(foreign.GPT, settings=Settings(drop_path=1.0)).eval()
    expected = model(TOKENS)[0]
    accelerate(model)
    torch.testing.assert_close(model(TOKENS)[0], expected)
    trained = model.train()(TOKENS)[0]
    torch.testing.assert_close(trained, foreign.GPT.forward(model, TOKENS)[0])
    assert not torch.allclose(trained, expected)
    assert restore(model).training
    with pytest.raises(UnsupportedModel, match="its forward is not nanoGPT's GPT"):
        accelerate(model)


@pytest.mark.filterwarnings("ignore:Looped runs its own forward")
def test_a_forced_backend_is_refused_while_a_module_deviates():
    model = accelerate(looped(), backend="cpu")
    wrap(model)
    with pytest.raises(ValueError, match=r"backend 'cpu' can't run this: .*c_fc is a .*Lora"):
        model(*FAST)
    unwrap(model)
    model(*FAST)
    wrap(model)
    with pytest.raises(ValueError, match="backend 'cpu' can't run this"):
        accelerate(model, backend="cpu")
    assert explain_backend(unwrap(model) or model, 3, 7).chosen == "cpu", "settings from before"


@pytest.mark.filterwarnings("ignore:Looped runs its own forward")
def test_a_copy_keeps_the_verdict_and_looks_at_its_own_modules(monkeypatch):
    model = accelerate(looped())
    monkeypatch.setattr(
        "looped_fast.dropin.verify.differences", lambda *_, **__: pytest.fail("verified again")
    )
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(*FAST), model(*FAST), rtol=0, atol=0)
    wrap(copied)
    copied(*FAST)
    assert (copied.calls, model.calls) == (1, 0)


@pytest.mark.filterwarnings("ignore:Looped runs its own forward")
def test_a_forward_that_counts_its_calls_is_not_verified_at_each():
    model = accelerate(looped())
    block_of(model).mlp.gelu = "none"
    with pytest.MonkeyPatch.context() as patch:
        from looped_fast.dropin import verify

        times, verified = [], verify.differences
        patch.setattr(verify, "differences", lambda *a, **k: times.append(1) or verified(*a, **k))
        for _ in range(5):
            model(*FAST)
    assert len(times) == 1
    assert model.calls == 5


@pytest.mark.filterwarnings("ignore:Looped runs its own forward")
def test_verifying_ends_for_a_model_that_never_stops_changing():
    model = accelerate(looped())
    for i in range(10):
        block_of(model).attn.settings.positions = 100 + i
        model(*FAST)
    assert "verified 8 times and changed again" in explain_backend(model, 3, 7).reasons["cpu"]
    accelerate(model)
    assert explain_backend(model, 3, 7).chosen != "reference"
