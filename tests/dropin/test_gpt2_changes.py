"""An accelerated ``GPT2Model`` whose modules or settings change, that is copied, or compiled."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import needs_engine
from test_gpt2 import IDS, OWN, gpt2, tensors
from torch import nn

from looped_fast import accelerate, explain_backend, restore

pytestmark = pytest.mark.filterwarnings("ignore:GPT2Model runs its own forward")

FLIPS = {
    "scale": lambda m: setattr(m.h[1].attn, "scaling", 1.0),
    "activation": lambda m: setattr(m.h[0].mlp, "act", nn.ReLU()),
    "eps": lambda m: setattr(m.ln_f, "eps", 1e-3),
    "heads": lambda m: setattr(m.h[1].attn, "head_dim", 16),
    "a Linear in place of a Conv1D": lambda m: setattr(m.h[0].attn, "c_proj", nn.Linear(32, 32)),
    "a scaled block": lambda m: m.h[0].register_forward_hook(lambda *a: a[2] * 2),
}


@pytest.mark.parametrize("flip", FLIPS.values(), ids=FLIPS.keys())
def test_a_setting_that_is_flipped_is_in_force(flip):
    model = accelerate(gpt2())
    before = model(IDS).last_hidden_state
    flip(model)
    own = type(model).forward(model, IDS)
    torch.testing.assert_close(tensors(model(IDS)), tensors(own))
    assert not torch.allclose(own.last_hidden_state, before, atol=1e-4)
    assert explain_backend(model, 3, 7).chosen == "reference"


def test_another_implementation_of_the_same_attention_stays_fast():
    model = accelerate(gpt2(attn_implementation="sdpa"))
    model.config._attn_implementation = "eager"
    model(IDS)
    assert explain_backend(model, 3, 7).chosen != "reference"


def test_dropout_runs_while_training():
    model = gpt2(dropout=0.5)
    with pytest.warns(UserWarning, match="GPT2Model runs its own forward: drop drops out"):
        accelerate(model)
    outputs = [model(IDS).last_hidden_state for _ in range(2)]
    assert not torch.equal(*outputs)
    model.eval()
    assert explain_backend(model, 3, 7).chosen != "reference"
    torch.testing.assert_close(tensors(model(IDS)), tensors(type(model).forward(model, IDS)))


def test_gradient_checkpointing_is_in_force_while_training():
    model = accelerate(gpt2()).train()
    expected = model(IDS).last_hidden_state
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
    assert "gradient_checkpointing" in explain_backend(model, 3, 7).reasons["cpu"]
    model.eval()
    model.wte._forward_hooks.clear()  # transformers leaves one there
    assert explain_backend(model, 3, 7).chosen != "reference"


def test_hooks_that_transformers_leaves_after_a_call_do_not_slow_the_next_ones():
    model = accelerate(gpt2())
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(hidden[-1], model(IDS).last_hidden_state, rtol=1e-5, atol=1e-6)
    assert explain_backend(model, 3, 7).chosen != "reference"
    torch.testing.assert_close(model(IDS, output_hidden_states=True).hidden_states, hidden)


@needs_engine
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_accelerated_and_independent(duplicate):
    model = accelerate(gpt2(), backend="cpu")
    copied = duplicate(model)
    torch.testing.assert_close(tensors(copied(IDS)), tensors(model(IDS)), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied(IDS).last_hidden_state.abs().sum() > 0
    assert explain_backend(restore(copied) and model, 3, 7).chosen == "cpu"


def test_restore_leaves_no_trace():
    model = gpt2()
    expected, before = model(IDS).last_hidden_state, dict(vars(model))
    restore(accelerate(model))
    assert vars(model) == before
    assert torch.equal(model(IDS).last_hidden_state, expected)


def test_what_is_saved_is_what_was_loaded(tmp_path):
    model = accelerate(gpt2())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(tensors(loaded(IDS)), tensors(model(IDS)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, *[OWN[name][0] for name in ("padding", "positions")]])
def test_compiles_without_a_graph_break(kwargs):
    model = accelerate(gpt2(attn_implementation="sdpa"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = type(model).forward(model, IDS, **kwargs)
    output = compiled(IDS, **kwargs)
    torch.testing.assert_close(tensors(output), tensors(expected), rtol=1e-5, atol=1e-6)


def test_a_mask_inside_torch_compile_is_in_force():
    model = accelerate(gpt2(attn_implementation="sdpa"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in (torch.ones(3, 7), OWN["padding"][0]["attention_mask"]):
        expected = type(model).forward(model, IDS, attention_mask=mask)
        output = compiled(IDS, attention_mask=mask)
        torch.testing.assert_close(tensors(output), tensors(expected), rtol=1e-5, atol=1e-6)


def test_other_models_are_accelerated_without_transformers():
    code = """
        import sys
        import foreign_models as foreign
        from looped_fast import accelerate, restore
        for make in (foreign.Looped, foreign.Standard, foreign.GPT):
            restore(accelerate(make()))
        assert "transformers" not in sys.modules
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
