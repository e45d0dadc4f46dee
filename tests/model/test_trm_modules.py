"""A changed module inside a Tiny Recursive Model is in force, and is named."""

from __future__ import annotations

import copy
import statistics
import time
import warnings

import pytest
import torch
from foreign_models import Lora
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from looped_fast import TinyRecursiveModel, TRMConfig, accelerate, explain_backend

CONFIG = TRMConfig(
    6, 9, hidden_size=32, num_heads=4, H_cycles=2, L_cycles=2, puzzle_emb_ndim=32
)  # fmt: skip
PUZZLES = torch.randint(6, (4, 9), generator=torch.Generator().manual_seed(1))
IDS = torch.zeros(4, dtype=torch.int64)
LAYER = "L_level.layers.0"
UPDATES = 2 * (2 + 1)  # of a state, in a supervision step


def build() -> TinyRecursiveModel:
    torch.manual_seed(0)
    model = TinyRecursiveModel(CONFIG)
    for parameter in (model.q_head.weight, model.puzzle_emb.weights):
        nn.init.normal_(parameter)
    return model


def step(model):
    output = model(PUZZLES, None, IDS)
    return output.logits, output.q_halt


def layer_of(model):
    return model.L_level.layers[0]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Other(nn.Module):
    """A module of another structure in place of one that is known."""

    def forward(self, x, *_):
        return torch.tanh(x)


def lora(model):
    layer_of(model).mlp.down_proj = Lora(layer_of(model).mlp.down_proj)


def pruned(model):
    prune.l1_unstructured(layer_of(model).self_attn.qkv_proj, "weight", amount=0.5)


def parametrized(model):
    parametrize.register_parametrization(layer_of(model).mlp.gate_up_proj, "weight", Doubled())


def weight_normed(model):
    norm = parametrizations.weight_norm(layer_of(model).self_attn.o_proj)
    with torch.no_grad():
        norm.parametrizations.weight.original0.mul_(2)


def replaced_attention(model):
    layer_of(model).self_attn = Other()


def replaced_mlp(model):
    layer_of(model).mlp = Other()


def replaced_layer(model):
    model.L_level.layers[1] = Other()


def with_a_bias(model):
    layer_of(model).mlp.down_proj = nn.Linear(256, 32)


def narrower(model):
    mlp = layer_of(model).mlp
    mlp.gate_up_proj, mlp.down_proj = nn.Linear(32, 96, bias=False), nn.Linear(48, 32, bias=False)


def dropping_out(model):
    mlp = layer_of(model).mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Dropout(0.5))


def forward_on_the_instance(model):
    layer_of(model).mlp.forward = lambda x: 2 * x


def other_eps(model):
    layer_of(model).settings = layer_of(model).settings._replace(norm_eps=0.5)


# A change -> the module that is named.
CHANGES = {
    lora: f"{LAYER}.mlp.down_proj is a .*Lora, not torch.nn.Linear",
    pruned: f"{LAYER}.self_attn.qkv_proj has a forward_pre_hook",
    parametrized: f"{LAYER}.mlp.gate_up_proj is parametrized",
    weight_normed: f"{LAYER}.self_attn.o_proj is parametrized",
    replaced_attention: f"{LAYER}.self_attn is a .*Other",
    replaced_mlp: f"{LAYER}.mlp is a .*Other",
    replaced_layer: "L_level.layers.1 is a .*Other",
    with_a_bias: f"{LAYER}.mlp.down_proj has a bias",
    narrower: f"{LAYER}.mlp.gate_up_proj has a weight of shape",
    dropping_out: f"{LAYER}.mlp.down_proj is a .*Sequential",
    forward_on_the_instance: f"{LAYER}.mlp has a forward of its own",
    other_eps: f"{LAYER}.settings is .*norm_eps=0.5",
}


def plain(model):
    """The model by its modules alone."""
    e = model.embed_tokens(PUZZLES)
    e = 32**0.5 * torch.cat((model.puzzle_emb(IDS)[:, None], e), dim=1)
    tables, (z_H, z_L) = model.rotary_emb(), model.initial_carry(4)
    for cycle in range(2):
        with torch.set_grad_enabled(cycle == 1):
            for _ in range(2):
                z_L = model.L_level(z_L, z_H + e, tables)
            z_H = model.L_level(z_H, z_L, tables)
    return model.lm_head(z_H)[:, 1:], model.q_head(z_H[:, 0])[:, 0]


def gradients(model, outputs):
    model.zero_grad()
    torch.manual_seed(2)
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:TinyRecursiveModel runs module by module")
@pytest.mark.parametrize(
    ("change", "named"), CHANGES.items(), ids=lambda c: getattr(c, "__name__", "")
)
def test_a_changed_module_is_in_force_and_named(change, named):
    model, unchanged = build(), step(build())
    step(model)
    change(model)
    torch.manual_seed(1)
    ours = step(model)
    torch.manual_seed(1)
    theirs = plain(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0], unchanged[0], rtol=1e-3)
    torch.testing.assert_close(
        gradients(model, ours), gradients(model, theirs), rtol=1e-3, atol=1e-4
    )
    selection = explain_backend(model, 4)
    assert selection.chosen == "reference"
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(selection.reasons["cpu"])


def test_a_block_with_other_heads_is_in_force():
    model = TinyRecursiveModel(TRMConfig(6, 9, 32, 4, H_cycles=1, pos_encodings="none"))
    before = model(PUZZLES).logits
    model.L_level.layers[1].self_attn.num_heads = 2
    with pytest.warns(UserWarning, match=r"L_level.layers.1.self_attn.num_heads is 2, not 4"):
        assert not torch.allclose(model(PUZZLES).logits, before, rtol=1e-3)


def test_it_is_said_once_and_undone():
    model = build()
    before = step(model)
    hook = layer_of(model).mlp.register_forward_hook(lambda m, args, output: 2 * output)
    with pytest.warns(UserWarning, match=f"module by module .*{LAYER}.mlp has a forward_hook"):
        changed = step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(step(model), changed)
        hook.remove()
        torch.testing.assert_close(step(model), before, rtol=0, atol=0)
    assert not torch.allclose(changed[0], before[0])


@pytest.mark.filterwarnings("ignore:TinyRecursiveModel runs module by module")
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("embed_tokens", 1), ("puzzle_emb", 1), ("rotary_emb", 1), ("lm_head", 1), ("q_head", 1),
        ("L_level", UPDATES), (f"{LAYER}", UPDATES), (f"{LAYER}.self_attn", UPDATES),
        (f"{LAYER}.self_attn.o_proj", UPDATES), ("L_level.layers.1.mlp.gate_up_proj", UPDATES),
    ],
)  # fmt: skip
def test_hooks_run_with_the_modules_values(name, calls):
    model, seen = build(), []
    expected = step(model)
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, o: seen.append(o))
    torch.testing.assert_close(step(model), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == calls
    handle.remove()
    step(model)
    assert len(seen) == calls


@pytest.mark.parametrize("name", ["embed_tokens", "puzzle_emb", "lm_head", "q_head"])
def test_changed_embeddings_and_heads_are_in_force_on_the_fast_path(name):
    model = build()
    before = step(model)
    model.get_submodule(name).register_forward_hook(lambda m, args, output: 3 * output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = step(model)
    at = 1 if name == "q_head" else 0
    assert not torch.allclose(changed[at], before[at], rtol=1e-3)
    torch.testing.assert_close(changed, plain(model), rtol=1e-4, atol=1e-5)
    assert not model.deviations()


def test_a_hook_on_every_module_is_in_force():
    model, seen = build(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with pytest.warns(UserWarning, match="every module has a forward_hook"):
            step(model)
    finally:
        handle.remove()
    assert seen.count(model.L_level) == UPDATES


def test_a_forced_backend_is_refused_while_a_module_deviates():
    model = build()
    model.backend = "compiled"
    lora(model)
    with pytest.raises(ValueError, match=r"backend 'compiled' can't run this: .*Lora"):
        step(model)


@pytest.mark.filterwarnings("ignore:TinyRecursiveModel runs module by module")
@pytest.mark.parametrize("changed", [False, True])
def test_precision_is_that_of_accelerate_by_modules_too(changed):
    model = build()
    if changed:
        layer_of(model).register_forward_hook(lambda *_: None)
    exact = step(model)
    lowered = step(accelerate(model, precision="bf16"))
    assert 1e-4 < (lowered[0] - exact[0]).norm() / exact[0].norm() < 0.2


@pytest.mark.filterwarnings("ignore:TinyRecursiveModel runs module by module")
def test_a_copy_looks_at_its_own_modules():
    model = build()
    expected = step(model)
    copied = copy.deepcopy(model)
    lora(copied)
    assert not torch.allclose(step(copied)[0], expected[0])
    torch.testing.assert_close(step(model), expected, rtol=0, atol=0)


def test_the_look_at_the_modules_takes_microseconds():
    model = build()
    model.deviations()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        model.deviations()
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 100e-6
