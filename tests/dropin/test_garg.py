"""The model of Garg et al. after ``accelerate``: its recorded numbers, in float64 and float32."""

from __future__ import annotations

import copy
import pickle

import foreign_models as foreign
import pytest
import torch
from conftest import needs_engine
from golden_cases import GARG_CASES, assert_as_good_as_plain, load_case
from test_dropin import (
    PROMPT,
    assert_an_optimizer_made_before_trains_alike,
    build,
    outputs_and_gradients,
)

from looped_fast import UnsupportedModel, accelerate, explain_backend, restore

pytest.importorskip("transformers")

SPARED = {"_backbone.wte.weight"}  # no token is read, so it was not recorded


def model_of(case, **settings):
    c = case.config
    sizes = {"n_dims": c["n_dims"], "D": c["n_embd"], "positions": 2 * c["n_positions"]}
    model = foreign.Garg(**sizes, n_layer=c["n_layer"], n_head=c["n_head"], **settings).double()
    missing, unexpected = model.load_state_dict(case.params, strict=False)
    assert set(missing) == SPARED
    assert not unexpected
    return model


def results(model, case, dtype):
    """Predictions, loss and gradients on a case's prompts."""
    model.to(dtype).zero_grad()
    xs, ys = case.xs.to(dtype), case.ys.to(dtype)
    predictions = model(xs, ys)
    loss = (predictions.to(dtype) - ys).square().mean()
    loss.backward()
    gradients = {
        f"grad {name}": p.grad for name, p in model.named_parameters() if name in case.grads
    }
    return {"preds": predictions.detach(), "loss": loss.detach(), **gradients}


def recorded(case):
    gradients = {f"grad {name}": gradient for name, gradient in case.grads.items()}
    return {"preds": case.preds, "loss": case.loss, **gradients}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", GARG_CASES)
def test_float64_has_the_recorded_predictions_loss_and_gradients(name, attention):
    case = load_case(name)
    model = accelerate(model_of(case, attn_implementation=attention), backend="reference")
    ours, truth = results(model, case, torch.float64), recorded(case)
    assert ours.keys() == truth.keys()
    for key, value in ours.items():
        error = (value - truth[key]).norm() / truth[key].norm()
        assert error <= 1e-10, f"{key}: {error:.1e}"


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_engine), "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", GARG_CASES)
def test_float32_is_as_good_as_plain_pytorch(name, precision, backend):
    case = load_case(name)
    model = model_of(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        plain = results(model, case, torch.float32)
    accelerate(model, backend=backend, precision=precision)
    assert_as_good_as_plain(case, results(model, case, torch.float32), plain, recorded(case))


@pytest.mark.parametrize("inds", [[3], [0, 6], torch.tensor([5, 1]), range(2)])
def test_predictions_at_some_points(inds):
    model = build(foreign.Garg).double()
    prompt = [t.double() for t in PROMPT]
    expected = model(*prompt, inds=inds)
    accelerate(model, backend="reference")
    torch.testing.assert_close(model(*prompt, inds), expected, rtol=1e-10, atol=1e-12)
    assert expected.shape == (3, len(inds))


@pytest.mark.parametrize("inds", [[7], [-1], [0, 9]])
def test_points_that_are_not_there_are_refused(inds):
    model = accelerate(build(foreign.Garg))
    with pytest.raises(ValueError, match="inds contain indices where xs and ys are not defined"):
        model(*PROMPT, inds=inds)


def test_an_optimizer_made_before_trains_the_model_as_it_would_have():
    assert_an_optimizer_made_before_trains_alike(foreign.Garg)


@needs_engine
def test_parameters_are_read_at_every_call():
    model = accelerate(build(foreign.Garg), backend="cpu")
    before = model(*PROMPT)
    with torch.no_grad():  # in place, as an optimizer does; and by a new tensor
        model._backbone.h[0].mlp.c_fc.weight.mul_(1.5)
        changed = model(*PROMPT)
        c_proj = model._backbone.h[1].attn.c_proj
        c_proj.weight = torch.nn.Parameter(c_proj.weight.flip(0))
    for predictions, previous in ((changed, before), (model(*PROMPT), changed)):
        assert not torch.allclose(predictions, previous, atol=1e-3)
    torch.testing.assert_close(model(*PROMPT), foreign.Garg.forward(model, *PROMPT))


def test_gradients_lie_as_the_parameters_do():
    _, gradients = outputs_and_gradients(accelerate(build(foreign.Garg)), PROMPT)
    weight = gradients["_backbone.h.0.mlp.c_fc.weight"]
    assert weight.shape == (32, 128)
    assert weight.is_contiguous()


def test_a_cache_that_the_configuration_asks_for_is_not_missed():
    model = build(foreign.Garg, use_cache=True)  # the model reads last_hidden_state alone
    expected = model(*PROMPT)
    torch.testing.assert_close(accelerate(model, backend="cpu")(*PROMPT), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_accelerated_and_independent(duplicate):
    model = accelerate(build(foreign.Garg), backend="cpu")
    copied = duplicate(model)
    assert explain_backend(copied, 3, 7).chosen == "cpu"
    torch.testing.assert_close(copied(*PROMPT), model(*PROMPT), rtol=0, atol=0)
    restore(copied)
    assert explain_backend(model, 3, 7).chosen == "cpu"


def test_restore_leaves_no_trace():
    model = build(foreign.Garg)
    expected, before = model(*PROMPT), dict(vars(model))
    restore(accelerate(model))
    assert vars(model) == before
    assert torch.equal(model(*PROMPT), expected)


def test_compiles_without_a_graph_break():
    model = accelerate(build(foreign.Garg))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*PROMPT), model(*PROMPT))


@pytest.mark.filterwarnings("ignore:Garg runs its own forward")
def test_dropout_runs_while_training():
    model = build(foreign.Garg, dropout=0.5)
    with pytest.warns(UserWarning, match=r"Garg runs its own forward: _backbone\.drop drops out"):
        accelerate(model)
    assert not torch.equal(model(*PROMPT), model(*PROMPT))
    model.eval()
    assert torch.equal(model(*PROMPT), model(*PROMPT))
    assert explain_backend(model, 3, 7).chosen != "reference"


@pytest.mark.filterwarnings("ignore:Garg runs its own forward")
@pytest.mark.parametrize(
    "name", ["_read_in", "_backbone", "_backbone.h.1", "_backbone.h.0.mlp.c_fc", "_read_out"]
)
def test_hooks_run_with_the_modules_values(name):
    model, seen = accelerate(build(foreign.Garg)), []
    expected = model(*PROMPT)
    handle = model.get_submodule(name).register_forward_hook(lambda *a: seen.append(a[2]))
    torch.testing.assert_close(model(*PROMPT), expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1
    assert f"{name} has a forward_hook" in explain_backend(model, 3, 7).reasons["cpu"]
    handle.remove()
    model(*PROMPT)
    assert len(seen) == 1


def relu_attention(module, query, key, value, attention_mask, **_):
    """As in ``TransformerRelu`` of Garg et al.: rectified scores in place of a softmax."""
    scores = (query @ key.mT / query.shape[-1] ** 0.5).tril()
    return (scores.relu() / query.shape[-2] @ value).transpose(1, 2), None


def test_attention_without_a_softmax_is_refused():
    from transformers import AttentionInterface

    AttentionInterface.register("relu", relu_attention)
    model = build(foreign.Garg, attn_implementation="relu")
    with pytest.raises(
        UnsupportedModel,
        match=r"Garg as the TransformerModel of Garg et al.*:\n"
        r"  - h\.0\.attn is not causal attention with 4 heads",
    ):
        accelerate(model)


def test_explain_backend_counts_two_tokens_a_point(monkeypatch):
    from looped_fast.ops import backends

    model, seen = accelerate(build(foreign.Garg)), []
    monkeypatch.setattr(
        backends, "UNSUPPORTED", {"reference": lambda call: seen.append(call) or None}
    )
    explain_backend(model, batch_size=3, n_points=7)
    (call,) = seen
    assert (call.batch, call.seq_len, call.n_embd, call.n_layer) == (3, 14, 32, 2)
    assert call.settings.n_heads == 4
