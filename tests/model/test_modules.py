"""A hook, an adapter, pruning or a replaced module inside a model is in force, and is named."""

from __future__ import annotations

import copy
import pickle
import statistics
import time
import warnings

import pytest
import torch
from foreign_models import Lora
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

from looped_fast import LoopedTransformer, ModelConfig, accelerate, explain_backend

CONFIG = ModelConfig(n_dims=4, n_positions=8, n_embd=32, n_head=4, n_loops=3, window=2)
BLOCK = "_backbone.transformer.h.0"
INNER = [
    "_read_in", "_read_out", "_backbone", "_backbone.transformer.wpe", BLOCK, f"{BLOCK}.ln_1",
    f"{BLOCK}.attn", f"{BLOCK}.attn.c_attn", f"{BLOCK}.attn.c_proj", f"{BLOCK}.ln_2",
    f"{BLOCK}.mlp", f"{BLOCK}.mlp.c_fc", f"{BLOCK}.mlp.c_proj", "_backbone.transformer.ln_f",
]  # fmt: skip
CALLS = {"_read_in": 1, "_read_out": 2}  # others run in each of the three loop steps


def build(**changes) -> LoopedTransformer:
    torch.manual_seed(0)
    model = LoopedTransformer(ModelConfig(**{**CONFIG.to_dict(), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and LayerNorms away from 0 and 1
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def prompt():
    return torch.randn(2, 8, 4), torch.randn(2, 8)


def block_of(model):
    return model._backbone.transformer["h"][0]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def lora(model):
    block_of(model).mlp.c_fc = Lora(block_of(model).mlp.c_fc)


def pruned(model):
    prune.l1_unstructured(block_of(model).attn.c_attn, "weight", amount=0.5)


def parametrized(model):
    parametrize.register_parametrization(block_of(model).mlp.c_proj, "weight", Doubled())


def weight_normed(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm = nn.utils.weight_norm(block_of(model).mlp.c_fc)
    with torch.no_grad():
        norm.weight_g.mul_(2)


def spectral_normed(model):
    parametrizations.spectral_norm(block_of(model).attn.c_proj)


def replaced_by_another_kind(model):
    block_of(model).ln_1 = nn.RMSNorm(32)


def without_bias(model):
    block_of(model).attn.c_proj = nn.Linear(32, 32, bias=False)


def narrower(model):
    block_of(model).mlp.c_fc, block_of(model).mlp.c_proj = nn.Linear(32, 48), nn.Linear(48, 32)


def dropping_out(model):
    block_of(model).mlp.c_proj = nn.Sequential(block_of(model).mlp.c_proj, nn.Dropout(0.5))


def other_eps(model):
    model._backbone.transformer["ln_f"].eps = 1e-1


def forward_on_the_instance(model):
    block_of(model).mlp.forward = lambda x: 2 * x


def renormalised_positions(model):
    model._backbone.transformer["wpe"].max_norm = 0.1


def quantized_read_out(model):
    model._read_out = torch.ao.nn.quantized.dynamic.Linear(32, 1)


CHANGES = [
    lora, pruned, parametrized, weight_normed, spectral_normed, replaced_by_another_kind,
    without_bias, narrower, dropping_out, other_eps, forward_on_the_instance,
    renormalised_positions, quantized_read_out,
]  # fmt: skip


def plain(model, xs, ys, n_loops=3, window=2):
    """The model by its modules alone: the official code's forward."""
    tokens = xs.new_zeros(len(xs), 16, 4)
    tokens[:, ::2], tokens[:, 1::2, 0] = xs, ys
    e = model._read_in(tokens)
    parts, z, predictions = model._backbone.transformer, torch.zeros_like(e), []
    for i in range(n_loops):
        with torch.set_grad_enabled(i >= n_loops - window):
            x = z + e + parts["wpe"](torch.arange(16))
            for block in parts["h"]:
                q, k, v = (
                    t.view(len(xs), 16, 4, 8).transpose(1, 2)
                    for t in block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
                )
                scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(16, 16).triu(1).bool(), -9e9)
                heads = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
                x = x + block.attn.c_proj(heads)
                h = block.ln_2(x)
                if "forward" in vars(block.mlp):
                    x = x + block.mlp(h)
                else:
                    x = x + block.mlp.c_proj(
                        nn.functional.gelu(block.mlp.c_fc(h), approximate="tanh")
                    )
            z = parts["ln_f"](x)
        if i >= n_loops - window:
            predictions.append(model._read_out(z)[:, ::2, 0])
    return torch.stack(predictions)


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
@pytest.mark.parametrize("name", INNER)
def test_a_forward_hook_runs_with_the_modules_values_once_per_loop_step(name, prompt):
    model, seen = build(), []
    expected = model(*prompt)
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    torch.testing.assert_close(model(*prompt), expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == CALLS.get(name, 3)
    handle.remove()
    for args, out in seen:
        torch.testing.assert_close(module(*args), out, rtol=0, atol=0)
    assert torch.equal(model(*prompt), expected), "the fast path is not back"
    assert len(seen) == CALLS.get(name, 3)


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
def test_a_hook_that_changes_an_output_changes_the_predictions_and_the_loss(prompt):
    model = build()
    before = model(*prompt), model.loss(*prompt)
    block_of(model).mlp.register_forward_pre_hook(lambda module, args: (0 * args[0],))
    predictions = model(*prompt)
    torch.testing.assert_close(predictions, plain_without_mlp_input(model, prompt))
    assert not torch.allclose(predictions, before[0])
    torch.testing.assert_close(model.loss(*prompt), (predictions - prompt[1]).square().mean())
    last = (predictions[-1] - prompt[1]).square().mean()
    torch.testing.assert_close(model.loss(*prompt, n_supervised=1), last)


def plain_without_mlp_input(model, prompt):
    copied = copy.deepcopy(model)
    mlp = block_of(copied).mlp
    mlp._forward_pre_hooks.clear()
    constant = mlp.c_proj(nn.functional.gelu(mlp.c_fc.bias, approximate="tanh")).detach()
    mlp.forward = lambda x: constant.expand_as(x)
    return plain(copied, *prompt)


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
def test_backward_hooks_run(prompt):
    model, seen = build(), []
    block_of(model).attn.register_full_backward_hook(lambda *_: seen.append("attn"))
    block_of(model).mlp.register_full_backward_pre_hook(lambda *_: seen.append("mlp"))
    model.loss(*prompt).backward()
    assert seen == ["mlp", "attn"] * 2  # the window has two steps


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
def test_hooks_on_every_module_run(prompt):
    model, seen = build(), []
    handle = global_hooks.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(*prompt)
        assert "every module has a forward_hook" in str(explain_backend(model, 2, 8))
    finally:
        handle.remove()
    assert seen.count(block_of(model).mlp.c_fc) == 3
    assert "forward_hook" not in str(explain_backend(model, 2, 8))


def test_hooks_on_the_model_itself_leave_it_fast(prompt):
    model, seen = build(), []
    model.register_forward_hook(lambda module, args, out: seen.append(out))
    assert model(*prompt) is seen[0]
    assert explain_backend(model, 2, 8).chosen != "reference"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before_accelerate", [None, True, False])
def test_a_changed_module_is_in_force_with_gradients(change, before_accelerate, prompt):
    model = build()
    was = model(*prompt)
    if before_accelerate is False:
        accelerate(model)
    change(model)
    if before_accelerate:
        accelerate(model)
    model.eval() if change is spectral_normed else None  # which iterates while training
    torch.manual_seed(1)  # of dropout
    predictions = model(*prompt)
    torch.manual_seed(1)
    expected = plain(model, *prompt)
    torch.testing.assert_close(predictions, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predictions, was, atol=1e-3)
    if change is quantized_read_out:
        return  # it has no gradient
    results = []
    for result in (predictions, expected):
        model.zero_grad()
        result.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert results[0].keys() >= {f"{BLOCK}.mlp.c_fc.{n}" for n in ("down", "up") if change is lora}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_explain_backend_names_the_changed_module(change):
    model = build()
    change(model)
    selection = explain_backend(model, 2, 8)
    assert selection.chosen == "reference"
    changed = {
        dropping_out: f"{BLOCK}.mlp.c_proj is a torch.nn.Sequential, not torch.nn.Linear",
        lora: rf"{BLOCK}.mlp.c_fc is a foreign_models.Lora, not torch.nn.Linear",
        narrower: f"{BLOCK}.mlp.c_fc has a weight of shape (48, 32), not (128, 32)",
        other_eps: "_backbone.transformer.ln_f has eps 0.1, not 1e-05",
        without_bias: f"{BLOCK}.attn.c_proj has no bias",
    }
    assert changed.get(change, "") in selection.reasons["cpu"]
    assert "it does not call modules, and _" in selection.reasons["cpu"]


class Constant(nn.Module):
    """Takes the place of any module inside; what it returns tells which calls came through it."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(32))

    def forward(self, x, *_):
        return self.value.expand_as(x)


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
@pytest.mark.parametrize("name", ["_backbone", BLOCK, f"{BLOCK}.attn", f"{BLOCK}.mlp"])
def test_a_part_of_another_structure_runs_in_its_place(name, prompt):
    model = build()
    was = model(*prompt)
    model.set_submodule(name, Constant())
    predictions = model(*prompt)
    assert not torch.allclose(predictions, was)
    predictions.sum().backward()
    assert model.get_submodule(name).value.grad.any()
    assert f"{name} is a {__name__}.Constant, not looped_fast.model" in str(
        explain_backend(model, 2, 8)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dynamically_quantized_copy_runs_its_quantized_modules(prompt):
    model = build()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    torch.testing.assert_close(quantized(*prompt), plain(quantized, *prompt))
    assert not torch.equal(quantized(*prompt), model(*prompt))
    assert explain_backend(quantized, 2, 8).chosen == "reference"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "undo"),
    [
        (lora, lambda m: setattr(block_of(m).mlp, "c_fc", block_of(m).mlp.c_fc.base)),
        (pruned, lambda m: prune.remove(block_of(m).attn.c_attn, "weight")),
        (parametrized, lambda m: parametrize.remove_parametrizations(
            block_of(m).mlp.c_proj, "weight")),
        (other_eps, lambda m: setattr(m._backbone.transformer["ln_f"], "eps", 1e-5)),
        (forward_on_the_instance, lambda m: delattr(block_of(m).mlp, "forward")),
    ],
)  # fmt: skip
def test_the_fast_path_is_back_when_the_change_is_gone(change, undo, prompt):
    model = build()
    fast = explain_backend(model, 2, 8).chosen
    change(model)
    model(*prompt)
    undo(model)
    assert explain_backend(model, 2, 8).chosen == fast
    torch.testing.assert_close(model(*prompt), plain(model, *prompt), rtol=1e-5, atol=1e-6)


def test_the_slow_path_is_said_once_and_again_for_another_reason(prompt):
    model = build()
    handle = block_of(model).ln_2.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=rf"runs module by module .*: {BLOCK}\.ln_2 has a forward"):
        model(*prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*prompt)
        model.loss(*prompt)
        handle.remove()
        model(*prompt)
    lora(model)
    with pytest.warns(UserWarning, match=r"mlp\.c_fc is a .*Lora"):
        model(*prompt)


def test_a_forced_backend_that_calls_no_modules_is_refused(prompt):
    model = build()
    model.backend = "cpu"
    lora(model)
    for call in (model, model.loss, model.states, lambda *_: explain_backend(model, 2, 8)):
        with pytest.raises(ValueError, match=r"'cpu' can't run this: .*c_fc is a .*Use backend='a"):
            call(*prompt)


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
@pytest.mark.parametrize("injection", ["add", "mul", "none", "every_block"])
@pytest.mark.parametrize("pred_type", ["regression", "classification"])
@pytest.mark.parametrize("recompute", [False, True])
def test_modules_compute_what_the_op_computes(injection, pred_type, recompute, prompt):
    model = build(injection=injection, pred_type=pred_type, n_layer=2).double()
    model.recompute = recompute
    xs, ys = (t.double() for t in prompt)
    results = []
    for _ in range(2):
        model.zero_grad()
        predictions = model(xs, ys)
        predictions.square().mean().backward()
        results.append((predictions, {name: p.grad for name, p in model.named_parameters()}))
        block_of(model).mlp.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
def test_modules_follow_autocast(prompt):
    model, dtypes = build(), []
    with torch.autocast("cpu", torch.bfloat16):
        model.backend = "reference"
        expected = model(*prompt)
        model.backend = "auto"
        block_of(model).mlp.c_fc.register_forward_hook(lambda m, a, o: dtypes.append(o.dtype))
        assert torch.equal(model(*prompt), expected)
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_looks_at_its_own_modules(duplicate, prompt):
    model = build()
    expected = model(*prompt)
    copied, seen = duplicate(model), []
    block_of(copied).mlp.register_forward_hook(lambda *_: seen.append(None))
    copied(*prompt)
    assert len(seen) == 3
    assert torch.equal(model(*prompt), expected)
    assert explain_backend(model, 2, 8).chosen != "reference"


def test_a_compiled_model_sees_a_wrapped_module(prompt):
    model = build()
    lora(model)
    with pytest.warns(UserWarning, match=r"c_fc is a"):
        expected = model(*prompt)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*prompt), expected)


@pytest.mark.filterwarnings("ignore:LoopedTransformer runs module by module")
def test_subclassed_parameters_run_in_their_modules(prompt):
    """Quantized weights of torchao and DTensor are such: memory that the op could not read."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = build()
    weight = block_of(model).mlp.c_fc.weight.detach()
    expected = model(*prompt)
    with torch.no_grad():
        block_of(model).mlp.c_fc.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
        outputs = model(*prompt)
    assert "TwoTensor as its weight" in str(explain_backend(model, 2, 8))
    torch.testing.assert_close(outputs.a, expected, rtol=1e-5, atol=1e-6)


def test_a_subclass_that_counts_its_calls_is_looked_at_in_full_once(prompt):
    class Counting(LoopedTransformer):
        calls = 0

        def forward(self, *args):
            self.calls += 1
            return super().forward(*args)

    model, judged = Counting(CONFIG), []
    model.watch._judge = lambda model: judged.append(model) or ()
    for _ in range(5):
        model(*prompt)
    assert model.calls == 5
    assert len(judged) == 1


def test_the_look_at_the_modules_costs_at_most_20_microseconds():
    model = LoopedTransformer(ModelConfig())
    assert model.watch(model) == ()
    rounds = []
    for _ in range(50):
        started = time.perf_counter()
        for _ in range(20):
            model.watch(model)
        rounds.append((time.perf_counter() - started) / 20)
    assert min(statistics.quantiles(rounds)) < 20e-6  # other tests run beside this one
