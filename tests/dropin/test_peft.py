"""Adapters of Hugging Face's peft on our model, and on accelerated ones of other code bases."""

from __future__ import annotations

import copy

import foreign_models as foreign
import pytest
import torch
from test_dropin import PROMPT, build

from looped_fast import LoopedTransformer, ModelConfig, accelerate, explain_backend

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* runs its own forward"),
    pytest.mark.filterwarnings("ignore:.* runs module by module"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft then sets it
]
CONFIG = ModelConfig(n_dims=5, n_positions=11, n_embd=32, n_head=4, n_loops=3, window=2)
LORA = {"r": 2, "target_modules": ["c_attn", "c_fc"], "lora_alpha": 8}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["c_fc"], feedforward_modules=["c_fc"]),
}


def own():
    return build(LoopedTransformer, config=CONFIG)


def official():
    return build(foreign.Looped)


def garg():
    return build(foreign.Garg)


def run(model):
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, LoopedTransformer | foreign.Garg):
        return model(*PROMPT)
    return torch.stack(model(*PROMPT, 1, 3))


def set_adapters(model):
    """Adapters start as the identity, and from random numbers; make them matter, and the same."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3" in name:
            mean = 1.0 if "ia3" in name or "magnitude" in name else 0.0
            torch.nn.init.normal_(parameter, mean, std=0.3)
    return model


@pytest.mark.parametrize("make", [own, official, garg])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before accelerate", "after accelerate", "without"])
def test_adapters_are_in_force_and_trained(make, kind, when):
    model = make()
    base = run(model)
    plain = set_adapters(peft.get_peft_model(copy.deepcopy(model), KINDS[kind]()))
    if when == "after accelerate":
        accelerate(model)
    adapted = set_adapters(peft.get_peft_model(model, KINDS[kind]()))
    if when == "before accelerate":
        accelerate(model)
    results = []
    for m in (plain, adapted):
        predictions = run(m)
        predictions.square().mean().backward()
        gradients = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        results.append((predictions, gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    predictions, gradients = results[1]
    assert not torch.allclose(predictions, base, atol=1e-2)
    assert gradients.keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in gradients.values())
    if when != "without" or make is own:
        assert "peft.tuners" in explain_backend(model, 3, 7).reasons["cpu"]


@pytest.mark.parametrize("make", [own, official, garg])
@pytest.mark.parametrize("accelerated_first", [False, True])
def test_merged_adapters_run_fast(make, accelerated_first):
    model = make()
    if accelerated_first:
        accelerate(model)
    adapted = set_adapters(peft.get_peft_model(model, KINDS["LoRA"]()))
    expected = run(adapted)
    merged = adapted.merge_and_unload()
    if not accelerated_first:
        accelerate(merged)
    assert explain_backend(merged, 3, 7).chosen != "reference"
    torch.testing.assert_close(run(merged), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_trains_adapters():
    model = own()
    adapted = set_adapters(peft.get_peft_model(model, KINDS["LoRA"]()))
    loss = model.loss(*PROMPT)
    torch.testing.assert_close(loss, (model(*PROMPT) - PROMPT[1]).square().mean())
    loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_an_adapter_switched_off_and_on():
    model = own()
    base = model(*PROMPT)
    adapted = set_adapters(peft.get_peft_model(model, KINDS["LoRA"]()))
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(*PROMPT), base, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(adapted(*PROMPT), base, atol=1e-2)
