"""accelerate and restore: same numbers, same parameters, and a refusal with reasons otherwise."""

import copy
import pickle

import foreign_models as foreign
import pytest
import torch
from foreign_models import Settings
from torch import nn

from looped_fast import (
    LoopedTransformer,
    ModelConfig,
    UnsupportedModel,
    accelerate,
    explain_backend,
    restore,
)
from looped_fast.ops import backends

PROMPT = (torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)), torch.ones(3, 7))
TOKENS = torch.arange(12).view(2, 6)
TARGETS = torch.tensor([[1, 2, -1, 4, 5, 6], [7, -1, 9, 10, 11, 12]])

KNOWN = {
    "looped": (foreign.Looped, {}, (*PROMPT, 2, 6)),
    "looped, window covers all": (foreign.Looped, {}, (*PROMPT, 0, 3)),
    "looped, negative start": (foreign.Looped, {}, (*PROMPT, -2, 3)),
    "looped, product": (foreign.Looped, {"loop_func": "z=f(x*z)"}, (*PROMPT, 2, 6)),
    "looped, two blocks": (foreign.Looped, {"settings": Settings(n_layer=2)}, (*PROMPT, 1, 3)),
    "looped, classes": (foreign.Looped, {"pred_type": "classification"}, (*PROMPT, 1, 3)),
    "looped, no biases": (foreign.Looped, {"settings": Settings(bias=False)}, (*PROMPT, 1, 3)),
    "standard": (foreign.Standard, {"settings": Settings(n_layer=3)}, PROMPT),
    "standard, injected": (foreign.Standard, {"settings": Settings(n_layer=3)}, (*PROMPT, True)),
    "tied": (foreign.Tied, {}, (*PROMPT, False)),
    "GPT": (foreign.GPT, {}, (TOKENS, TARGETS)),
    "GPT, last position": (foreign.GPT, {}, (TOKENS,)),
    "GPT, no biases": (foreign.GPT, {"settings": Settings(bias=False)}, (TOKENS, TARGETS)),
}


def build(make, **kwargs):
    torch.manual_seed(0)
    model = make(**kwargs)
    for parameter in model.parameters():  # biases and LayerNorms away from 0 and 1
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


def own_model():
    return LoopedTransformer(ModelConfig(5, 11, 32, n_loops=4, window=2))


def tensors(output):
    outputs = output if isinstance(output, list | tuple) else [output]
    return [o for o in outputs if o is not None]


def outputs_and_gradients(model, args):
    model.zero_grad()
    outputs = tensors(model(*args))
    sum((o - 0.5).square().mean() for o in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outputs, gradients


@pytest.mark.parametrize(("make", "kwargs", "args"), KNOWN.values(), ids=KNOWN.keys())
def test_outputs_and_gradients_stay_the_same(make, kwargs, args):
    model = build(make, **kwargs).double()
    args = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    outputs, gradients = outputs_and_gradients(model, args)
    fast_outputs, fast_gradients = outputs_and_gradients(accelerate(model), args)
    torch.testing.assert_close(fast_outputs, outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast_gradients, gradients, rtol=1e-10, atol=1e-12)


def test_the_replaced_forward_does_not_run():
    model = accelerate(build(foreign.Standard))
    model(*PROMPT)
    assert model.calls == 0


def test_looped_without_steps_in_the_window_predicts_nothing():
    assert accelerate(build(foreign.Looped))(*PROMPT, 4, 4) == []


def assert_an_optimizer_made_before_trains_alike(kind, *args):
    """Five steps of a model that is called with the prompt and ``args``, plain and accelerated."""
    results = []
    for prepare in (lambda model: model, accelerate):
        model = build(kind).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        prepare(model)
        xs, ys = (t.double() for t in PROMPT)
        for _ in range(5):
            optimizer.zero_grad()
            returned = model(xs, ys, *args)
            predictions = returned if isinstance(returned, list) else [returned]
            loss = sum((p - ys).square().mean() for p in predictions)
            loss.backward()
            optimizer.step()
        results.append([loss, *model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)


def test_an_optimizer_made_before_trains_the_model_as_it_would_have():
    assert_an_optimizer_made_before_trains_alike(foreign.Looped, 2, 5)


def test_class_modules_parameters_and_state_dict_are_untouched():
    def inventory(model):
        named = {**dict(model.named_modules()), **dict(model.named_parameters())}
        return type(model), {name: id(x) for name, x in named.items()}, list(model.state_dict())

    model = build(foreign.Looped)
    before = inventory(model)
    assert inventory(accelerate(model)) == before


def test_loaded_parameters_are_used():
    model = accelerate(build(foreign.Looped))
    other = foreign.Looped()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(*PROMPT, 2, 5), other(*PROMPT, 2, 5))


def test_restore_leaves_no_trace():
    model = build(foreign.Looped)
    expected, before = model(*PROMPT, 2, 5), dict(vars(model))
    restore(accelerate(model))
    assert vars(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model(*PROMPT, 2, 5), expected, strict=True))


def test_restore_of_a_model_that_is_not_accelerated_says_so():
    with pytest.raises(ValueError, match="Standard is not accelerated"):
        restore(build(foreign.Standard))


def test_accelerating_twice_keeps_the_last_settings_and_one_restore_undoes_it():
    model = accelerate(build(foreign.Standard))
    accelerate(model, precision="bf16")
    assert not torch.equal(model(*PROMPT), accelerate(copy.deepcopy(model))(*PROMPT))
    restore(model)
    model(*PROMPT)
    assert model.calls == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [foreign.Standard, own_model])
def test_a_copy_is_accelerated_and_independent(make, duplicate):
    model = accelerate(build(make), precision="bf16")
    copied = duplicate(model)
    torch.testing.assert_close(copied(*PROMPT), model(*PROMPT), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied(*PROMPT).abs().sum() > 0
    restore(copied)
    restore(model)


def test_precision_bf16_computes_as_under_autocast():
    model = accelerate(build(foreign.Looped))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*PROMPT, 2, 5)
    accelerate(model, precision="bf16")
    torch.testing.assert_close(model(*PROMPT, 2, 5), expected, rtol=0, atol=0)


def test_precision_fp32_ignores_autocast():
    model = accelerate(build(foreign.Looped), precision="fp32")
    expected = model(*PROMPT, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*PROMPT, 2, 5), expected, rtol=0, atol=0)


def test_compiles_without_a_graph_break():
    model = accelerate(build(foreign.Looped))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*PROMPT, 1, 3), model(*PROMPT, 1, 3))


def test_verifying_changes_neither_random_numbers_nor_output_nor_attributes(capsys):
    model = build(foreign.Standard)
    state = torch.get_rng_state()
    with torch.inference_mode():
        accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""
    assert model.calls == 0


def test_own_model_takes_backend_and_precision_and_gives_them_back():
    model = build(own_model)
    model.backend = "reference"
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*PROMPT)
    model.backend = "auto"
    accelerate(model, backend="reference", precision="bf16")
    accelerate(model, backend="reference", precision="bf16")
    assert model.backend == "reference"
    torch.testing.assert_close(model(*PROMPT), expected, rtol=0, atol=0)
    restore(model)
    assert model.backend == "auto"
    assert "forward" not in vars(model)


# A lookalike -> what the refusal names.
LOOKALIKES = {
    "exact GELU": (Settings(gelu="none"), r"h\.0\.mlp is not .* GELU in its tanh form"),
    "eps": (Settings(eps=9e-6), r"h\.0\.ln_1 is not LayerNorm .* eps 1e-05.*\n.*ln_2.*\n.*ln_f"),
    "not causal": (Settings(causal=False), r"h\.0\.attn is not causal attention with 4 heads"),
    "sliding window": (Settings(look_back=8), r"h\.0\.attn does not see all earlier of 23 tokens"),
    "score scale": (Settings(scale=1.0), r"h\.0\.attn is not causal attention"),
    "post-norm": (Settings(post_norm=True), "its forward is not TransformerModelLooped's"),
    "gradient cut": (Settings(detach=True), "its forward is not .*: gradients differ"),
}


@pytest.mark.parametrize(("settings", "reason"), LOOKALIKES.values(), ids=LOOKALIKES.keys())
def test_lookalikes_are_refused_by_name(settings, reason):
    model = build(foreign.Looped, settings=settings)
    with pytest.raises(UnsupportedModel, match=reason):
        accelerate(model)
    assert "forward" not in vars(model)


def test_a_lookalike_with_zero_weights_is_refused_too():
    model = build(foreign.Looped, settings=Settings(gelu="none"))
    for parameter in model._backbone.transformer.h[0].mlp.parameters():  # hides any activation
        nn.init.zeros_(parameter)
    with pytest.raises(UnsupportedModel, match="tanh form"):
        accelerate(model)


def test_a_changed_forward_of_a_subclass_is_refused():
    class Scaled(foreign.Standard):
        def forward(self, xs, ys):
            return 2 * super().forward(xs, ys)

    with pytest.raises(UnsupportedModel, match="Scaled as TransformerModel"):
        accelerate(build(Scaled))


def test_a_forward_replaced_on_the_instance_is_refused():
    model = build(foreign.Standard)
    model.forward = lambda xs, ys: ys
    with pytest.raises(UnsupportedModel, match="replaced on this instance"):
        accelerate(model)


def test_unknown_structures_are_refused():
    with pytest.raises(UnsupportedModel, match=r"none of: TransformerModelLooped.*GPT"):
        accelerate(nn.Linear(3, 3))


def test_missing_parts_are_all_named():
    model = build(foreign.Looped)
    del model.freq, model._backbone.transformer.h[0].attn.c_proj
    with pytest.raises(UnsupportedModel) as caught:
        accelerate(model)
    assert caught.value.reasons == ["it has no freq", "h.0 has no attn.c_proj.weight"]


def test_shapes_that_do_not_fit_are_named():
    model = build(foreign.GPT)  # GPT-2 of transformers holds its weights transposed
    c_attn = model.transformer.h[0].attn.c_attn
    c_attn.weight = nn.Parameter(c_attn.weight.T.contiguous())
    with pytest.raises(UnsupportedModel, match=r"block 0 c_attn_weight has shape \(32, 96\)"):
        accelerate(model)


def test_low_precision_parameters_are_refused_with_the_remedy():
    with pytest.raises(UnsupportedModel, match=r"torch\.bfloat16; keep them in torch\.float32"):
        accelerate(build(foreign.Standard).bfloat16())


def test_compiled_models_are_refused_with_the_remedy():
    with pytest.raises(UnsupportedModel, match="accelerate the model, then compile it"):
        accelerate(torch.compile(build(foreign.Standard)))


def test_verifying_runs_no_hook_of_the_model_itself():
    model, calls = build(foreign.GPT), []
    model.register_forward_hook(lambda module, *_: calls.append(module))
    accelerate(model)
    assert not calls
    model(TOKENS)
    assert calls == [model]


def test_dropout_set_to_zero_after_accelerating_may_train():
    model = accelerate(build(foreign.GPT, settings=Settings(p=0.1)).eval())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert explain_backend(model.train(), 2, 6).chosen != "reference"


def test_verifying_leaves_modes_and_dropout_as_they_were():
    model = build(foreign.Standard, settings=Settings(p=0.1)).eval()
    model._backbone.transformer.h.train()
    for module in model._backbone.transformer.h.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = [(m.training, getattr(m, "p", None)) for m in model.modules()]
    accelerate(model)
    assert [(m.training, getattr(m, "p", None)) for m in model.modules()] == before


@pytest.mark.parametrize(("make", "tokens"), [(foreign.Standard, 14), (foreign.GPT, 7)])
def test_explain_backend_describes_an_accelerated_model(make, tokens, monkeypatch):
    model = build(make)
    with pytest.raises(ValueError, match=r"accelerate\(model\) first"):
        explain_backend(model, batch_size=3, n_points=7)
    accelerate(model, precision="bf16")
    seen = []
    monkeypatch.setattr(
        backends, "UNSUPPORTED", {"reference": lambda call: seen.append(call) or None}
    )
    assert explain_backend(model, batch_size=3, n_points=7).chosen == "reference"
    (call,) = seen
    assert (call.batch, call.seq_len, call.n_embd) == (3, tokens, 32)
    assert (call.settings.n_heads, call.settings.precision) == (4, "bf16")


@pytest.mark.parametrize("build_model", [own_model, foreign.Standard])
def test_the_given_attention_reaches_the_loop(build_model):
    model = accelerate(build(build_model), attention="sdpa", backend="reference")
    with pytest.raises(ValueError, match="attention 'sdpa' needs the triton backend"):
        model(*PROMPT)
    restore(model)
    model(*PROMPT)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="unknown backend 'cqu'; did you mean 'cpu'"):
        accelerate(build(foreign.Standard), backend="cqu")
    with pytest.raises(ValueError, match="unknown precision 'int8'"):
        accelerate(build(foreign.Standard), precision="int8")
    with pytest.raises(ValueError, match="unknown attention 'sdpb'; did you mean 'sdpa'"):
        accelerate(build(foreign.Standard), attention="sdpb")


def test_a_prompt_beyond_the_positions_is_refused():
    model = accelerate(build(foreign.Standard))
    with pytest.raises(ValueError, match=r"positions has shape \(23, 32\); \(24, 32\)"):
        model(torch.zeros(1, 12, 5), torch.zeros(1, 12))


def test_the_refusal_survives_pickling():
    error = UnsupportedModel("Net", ["a", "b"])
    loaded = pickle.loads(pickle.dumps(error))
    assert str(loaded) == str(error) == "can't accelerate Net:\n  - a\n  - b"
