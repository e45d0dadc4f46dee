"""Hugging Face's ``GPT2Model`` after ``accelerate``: the same results, whatever a call asks for."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import foreign_models as foreign
import pytest
import torch
from conftest import needs_engine
from golden_cases import assert_as_good_as_plain
from test_dropin import build

from looped_fast import UnsupportedModel, accelerate

transformers = pytest.importorskip("transformers")

B, S, D = 3, 7, 32
IDS = torch.randint(15, (B, S), generator=torch.Generator().manual_seed(1))
EMBEDS = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2))
ONES = torch.ones(B, S)
FAST = {
    "ids": ((IDS,), {}),
    "ids by name": ((), {"input_ids": IDS}),
    "ids of one sequence": ((IDS[0],), {}),
    "ids in several dimensions": ((IDS.view(1, B, S),), {}),
    "embeddings": ((), {"inputs_embeds": EMBEDS}),
    "a mask of ones": ((IDS,), {"attention_mask": ONES.long()}),
    "a mask of ones for embeddings": ((), {"inputs_embeds": EMBEDS, "attention_mask": ONES}),
    "what is switched off": (
        (IDS,),
        {"use_cache": False, "output_attentions": False, "output_hidden_states": False},
    ),
    "what is not given": ((IDS, None, None), {"position_ids": None, "token_type_ids": None}),
    "a record": ((IDS,), {"return_dict": True}),
}
PADDED = ONES.clone()
PADDED[0, :3] = 0
# Arguments of a call -> what the warning names.
OWN = {
    "padding": ({"attention_mask": PADDED}, "attention_mask hides tokens"),
    "a mask of another length": (
        {"attention_mask": torch.ones(B, S, S).tril()[:, None].bool()},
        "attention_mask hides tokens",
    ),
    "cache": ({"use_cache": True}, r"use_cache asks for a cache .* config\.use_cache = False"),
    "attentions": ({"output_attentions": True}, "output_attentions asks for attention weights"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states asks for"),
    "positions": ({"position_ids": torch.arange(S).flip(0)[None]}, "position_ids is given"),
    "token types": ({"token_type_ids": IDS}, "token_type_ids is given"),
    "a tuple": ({"return_dict": False}, "return_dict=False asks for a tuple"),
    "all of a kind": ({"is_causal": False}, "is_causal is given"),
}


def gpt2(**settings):
    return build(foreign.gpt2, **settings)


def tensors(output):
    """Every tensor of a result, by its name or place."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return {name: tensors(value) for name, value in output.items()}
    if isinstance(output, transformers.Cache):
        return [tensors(layer.keys) + tensors(layer.values) for layer in output.layers]
    return [tensors(value) for value in output]


def in_dtype(arguments, dtype):
    args, kwargs = arguments
    kwargs = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and k == "inputs_embeds" else v
        for k, v in kwargs.items()
    }
    return args, kwargs


def results(model, arguments, dtype):
    """The last hidden state, and gradients of a loss on it."""
    args, kwargs = in_dtype(arguments, dtype)
    model.to(dtype).zero_grad()
    hidden = model(*args, **kwargs).last_hidden_state
    (hidden - 0.5).square().mean().backward()
    gradients = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"preds": hidden.detach(), **gradients}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("arguments", FAST.values(), ids=FAST.keys())
def test_float64_has_the_models_own_results_and_gradients(arguments, attention):
    model = gpt2(attn_implementation=attention)
    expected = results(model, arguments, torch.float64)
    accelerate(model, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = results(model, arguments, torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    args, kwargs = in_dtype(arguments, torch.float64)
    output = model(*args, **kwargs)
    assert type(output) is transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions
    assert list(output) == ["last_hidden_state"]


@needs_engine
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arguments", FAST.values(), ids=FAST.keys())
def test_float32_is_as_good_as_plain_pytorch(arguments, precision):
    model = gpt2()
    truth = results(copy.deepcopy(model), arguments, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        plain = results(model, arguments, torch.float32)
    accelerate(model, backend="cpu", precision=precision)  # which its own forward would refuse
    case = SimpleNamespace(config={})
    assert_as_good_as_plain(case, results(model, arguments, torch.float32), plain, truth)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kwargs", "named"), OWN.values(), ids=OWN.keys())
def test_a_call_that_asks_for_more_gets_it_and_it_is_said_once(kwargs, named, attention):
    if "output_attentions" in kwargs and attention == "sdpa":
        pytest.skip("transformers has no weights of sdpa's attention")
    model = gpt2(attn_implementation=attention)
    expected = model(IDS, **kwargs)
    accelerate(model)
    with pytest.warns(UserWarning, match=f"GPT2Model runs its own forward: {named}"):
        output = model(IDS, **kwargs)
    assert type(output) is type(expected)
    torch.testing.assert_close(tensors(output), tensors(expected), rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, **kwargs)


@needs_engine
@pytest.mark.parametrize(("kwargs", "named"), OWN.values(), ids=OWN.keys())
def test_a_forced_backend_is_refused_for_such_a_call(kwargs, named):
    model = accelerate(gpt2(), backend="cpu")
    with pytest.raises(ValueError, match=f"backend 'cpu' can't run this: .*{named}"):
        model(IDS, **kwargs)
    model(IDS)


def test_arguments_by_position_are_not_taken_for_others():
    model = gpt2()
    expected = model(IDS, None, PADDED)
    accelerate(model)
    with pytest.warns(UserWarning, match="after input_ids are given by position"):
        torch.testing.assert_close(tensors(model(IDS, None, PADDED)), tensors(expected))


@pytest.mark.filterwarnings("ignore:GPT2Model runs its own forward")
@pytest.mark.parametrize("kwargs", [{}, {"input_ids": IDS, "inputs_embeds": EMBEDS}])
def test_no_tokens_and_twice_the_tokens_are_refused_as_by_the_model(kwargs):
    model = accelerate(gpt2())
    with pytest.raises(ValueError, match="input_ids"):
        model(**kwargs)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("use_cache", "pass use_cache=False, or set config.use_cache = False"),
        ("output_hidden_states", "output_hidden_states asks for hidden states"),
        ("output_attentions", "output_attentions asks for attention weights"),
    ],
)
def test_what_the_configuration_asks_for_is_given(name, named):
    model = gpt2(**{"attn_implementation": "eager", name: True})
    expected = model(IDS)
    assert len(expected) > 1
    accelerate(model)
    with pytest.warns(UserWarning, match=named):
        torch.testing.assert_close(tensors(model(IDS)), tensors(expected), rtol=1e-5, atol=1e-6)
    assert list(accelerate(model, backend="cpu")(IDS, **{name: False})) == ["last_hidden_state"]


def test_keys_and_values_of_an_earlier_call_are_in_force():
    model = gpt2()
    whole = model(IDS).last_hidden_state
    accelerate(model)
    with pytest.warns(UserWarning, match="use_cache asks for a cache"):
        first = model(IDS[:, :4], use_cache=True)
    name, cache = next((k, v) for k, v in first.items() if k != "last_hidden_state")
    with pytest.warns(UserWarning, match=f"{name} is given"):
        rest = model(IDS[:, 4:], **{name: cache})
    torch.testing.assert_close(rest.last_hidden_state, whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_model_with_cross_attention_runs_fast_without_an_encoder():
    model = gpt2(add_cross_attention=True)
    seen = {"encoder_hidden_states": EMBEDS}
    alone, expected = model(IDS), model(IDS, **seen)
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(tensors(model(IDS)), tensors(alone), rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="encoder_hidden_states is given"):
        output = model(IDS, **seen)
    torch.testing.assert_close(tensors(output), tensors(expected), rtol=1e-5, atol=1e-6)


def test_embeddings_of_less_precision_are_promoted_as_by_the_model():
    model = gpt2()
    low = EMBEDS.bfloat16()
    expected = model(inputs_embeds=low).last_hidden_state
    assert expected.dtype == torch.float32
    output = accelerate(model, backend="cpu")(inputs_embeds=low).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_tokens_beyond_the_positions_are_refused():
    model = accelerate(gpt2())
    with pytest.raises(ValueError, match=r"positions has shape \(22, 32\); \(23, 32\)"):
        model(torch.zeros(1, 23, dtype=torch.long))


def test_padding_without_a_mask_is_said_as_by_the_model(monkeypatch):
    said = []
    model = accelerate(gpt2(pad_token_id=14))
    monkeypatch.setattr(
        type(model), "warn_if_padding_and_no_attention_mask", lambda self, *a: said.append(a)
    )
    model(IDS)
    ((ids, mask),) = said
    assert torch.equal(ids, IDS)
    assert mask is None


# Settings of the configuration -> what the refusal names.
REFUSED = {
    "ReLU": ({"activation_function": "relu"}, r"h\.0\.mlp is not .*, GELU in its tanh form"),
    "exact GELU": ({"activation_function": "gelu"}, r"h\.1\.mlp is not .* \(not exact\)"),
    "SiLU": ({"activation_function": "silu"}, r"h\.0\.mlp is not Linear, GELU"),
    "eps": ({"layer_norm_epsilon": 1e-6}, r"h\.0\.ln_1 is not .* eps 1e-05.*\n.*ln_2(.*\n)*.*ln_f"),
    "unscaled": ({"scale_attn_weights": False}, r"h\.0\.attn is not causal attention with 4 heads"),
    "scaled by layer": (
        {"scale_attn_by_inverse_layer_idx": True},
        r":\n  - h\.1\.attn is not causal attention",
    ),
    "upcast": (
        {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
        "h.0.attn is not causal attention.*float32",
    ),
    "width": ({"n_inner": 96}, r"block 0 c_fc_weight has shape \(96, 32\); \(128, 32\) is needed"),
    "no blocks": ({"n_layer": 0}, "its stack h holds no blocks"),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_configurations_of_other_models_are_refused_by_name(settings, reason):
    model = gpt2(**settings)
    with pytest.raises(UnsupportedModel, match=r"GPT2Model as Hugging Face's GPT2Model:\n"):
        accelerate(model)
    with pytest.raises(UnsupportedModel, match=reason):
        accelerate(model)
    assert "forward" not in vars(model)


def test_low_precision_parameters_are_refused_with_the_remedy():
    with pytest.raises(UnsupportedModel, match=r"torch\.bfloat16; keep them in torch\.float32"):
        accelerate(gpt2().bfloat16())


class Sliding(transformers.GPT2Model):
    """Sees the last eight tokens alone."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        mask = (ones.tril() & ones.triu(-8))[None, None]
        return super().forward(inputs_embeds=x, attention_mask=mask, **kwargs)


def test_a_mask_that_shows_on_long_inputs_alone_is_refused():
    model = build(Sliding, config=foreign.gpt2_config(use_cache=False, attn_implementation="sdpa"))
    with pytest.raises(UnsupportedModel, match="its forward differs where inputs are long"):
        accelerate(model)


def test_a_model_with_a_head_is_refused_with_the_remedy():
    model = transformers.GPT2LMHeadModel(foreign.gpt2_config())
    with pytest.raises(UnsupportedModel, match=r"GPT2Model: accelerate\(model\.transformer\)"):
        accelerate(model)


@pytest.mark.filterwarnings("ignore:GPT2Model runs its own forward")
def test_a_language_model_on_an_accelerated_one_trains_and_generates():
    model = build(transformers.GPT2LMHeadModel, config=foreign.gpt2_config()).eval()
    expected = model(IDS, labels=IDS, use_cache=False)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 14}
    written = model.generate(IDS, attention_mask=ONES, **settings)
    accelerate(model.transformer)
    output = model(IDS, labels=IDS, use_cache=False)
    torch.testing.assert_close(tensors(output), tensors(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(IDS, attention_mask=ONES, **settings), written)
