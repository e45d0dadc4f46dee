"""FLOPs of the fast backends are those that FlopCounterMode counts for the reference."""

import subprocess
import sys

import pytest
import torch
from conftest import CALL, leaves, loop_inputs, needs_engine, prompt, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from looped_fast import ops
from looped_fast.ops import backends
from looped_fast.ops.flops import loop_flops

ENGINE = {"n_embd": 32, "n_head": 4, "n_loops": 3}  # sizes that the CPU engine takes


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def infer(model, xs, ys):
    with torch.no_grad():
        model(xs, ys)


CALLS = {
    "inference": infer,
    "forward": lambda model, xs, ys: model(xs, ys),
    "training": lambda model, xs, ys: model(xs, ys).square().sum().backward(),
    "loss": lambda model, xs, ys: model.loss(xs, ys).backward(),
    "supervised": lambda model, xs, ys: model.loss(xs, ys, n_supervised=1).backward(),
}


def on_backends(call, freeze=lambda name: False, recompute=False, **changes):
    """FLOPs of a call on the engine, and on the reference."""
    model, (xs, ys) = small_model(**{**ENGINE, **changes}), prompt()
    model.recompute = recompute
    for name, p in model.named_parameters():
        p.requires_grad_(not freeze(name))
    found = []
    for model.backend in ("cpu", "reference"):
        found.append(count(lambda: call(model, xs, ys)))
    return found


@needs_engine
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 3},
        {"n_layer": 2, "injection": "every_block"},
        {"injection": "none", "window": 3},
        {"injection": "mul", "window": 1},
    ],
    ids=str,
)
def test_the_engine_counts_as_the_reference(call, changes):
    engine, reference = on_backends(call, **changes)
    assert engine == reference > 0


@needs_engine
@pytest.mark.parametrize("changes", [{}, {"window": 3, "n_layer": 2}], ids=str)
def test_recomputed_activations_are_counted_as_the_reference_does(changes):
    engine, reference = on_backends(CALLS["training"], recompute=True, **changes)
    assert engine == reference > on_backends(CALLS["training"], **changes)[0]


FROZEN = {
    "read-in and positions": lambda name: "_read_in" in name or "wpe" in name,
    "all but the last matrix": lambda name: "mlp.c_proj" not in name,
    "all but a bias of attention": lambda name: "c_attn.bias" not in name,
    "matrices": lambda name: "c_" in name and name.endswith("weight"),
    "all but the read-out": lambda name: "_read_out" not in name,
    "the first block and below": lambda name: "h.1" not in name,
}


@needs_engine
@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("call", ["training", "loss"])
@pytest.mark.parametrize("window", [2, 3])
def test_gradients_of_frozen_parameters_are_not_counted(freeze, call, window):
    changes = {"n_layer": 2, "window": window}
    engine, reference = on_backends(CALLS[call], freeze, **changes)
    assert engine == reference < on_backends(CALLS[call], **changes)[0]


@needs_engine
def test_outputs_of_a_classifier_are_counted():
    for call in (infer, CALLS["training"]):
        engine, reference = on_backends(call, pred_type="classification")
        assert engine == reference > on_backends(call)[0]


@needs_engine
def test_a_backward_alone_is_counted():
    found = []
    for backend in ("cpu", "reference"):
        model, (xs, ys) = small_model(**ENGINE), prompt()
        model.backend = backend
        total = model(xs, ys).sum()
        found.append(count(total.backward))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("n_outputs", [0, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_kernels_count_as_the_reference(n_outputs, recompute):
    if reason := backends.UNSUPPORTED["triton"](CALL):
        pytest.skip(reason)
    inputs = loop_inputs(B=1, S=6, D=64, dtype=torch.float32, n_outputs=n_outputs)
    for tensor in leaves(inputs).values():
        tensor.requires_grad_()
    settings = {"n_heads": 4, "n_loops": 3, "window": 2, "recompute": recompute}

    def run(backend):
        ops.loop(**inputs, **settings, backend=backend).sum().backward()

    assert count(lambda: run("triton")) == count(lambda: run("reference")) > 0


def test_the_convention_is_pytorchs():
    """All keys are counted, and the backward of attention has 5 products to the forward's 2."""
    B, S, D, n_loops, window = 2, 6, 16, 3, 2
    inputs = loop_inputs(B, S, D, n_layer=2, dtype=torch.float32)
    for tensor in leaves(inputs).values():
        tensor.requires_grad_()

    def run():
        settings = {"n_heads": 2, "n_loops": n_loops, "window": window}
        ops.loop(**inputs, **settings, backend="reference").sum().backward()

    linear, scores = 2 * 12 * D * D * S, 2 * S * S * D  # of a block and sequence, forward
    fused = n_loops * (linear + 2 * scores) + window * (2 * linear + 5 * scores)
    assert count(run) == 2 * B * fused
    assert loop_flops(B, S, D, 2, n_loops, window) == 2 * B * fused
    written_out = n_loops * (linear + 2 * scores) + window * (2 * linear + 4 * scores)
    with sdpa_kernel(SDPBackend.MATH):
        assert count(run) == 2 * B * written_out


def test_visible_keys_are_those_that_the_causal_mask_leaves():
    S = 6
    visible = sum(query + 1 for query in range(S))
    hidden = S * S - visible
    difference = loop_flops(2, S, 16, 1, 3, 2) - loop_flops(2, S, 16, 1, 3, 2, keys=visible / S)
    assert difference == 2 * (3 * 2 + 2 * 5) * 2 * 16 * hidden


def test_a_table_of_modules_has_the_model_on_its_backend(recwarn):
    model, (xs, ys) = small_model(**ENGINE), prompt()
    with FlopCounterMode(display=False) as counter:
        model(xs, ys)
    assert set(counter.get_flop_counts()) == {"Global", "LoopedTransformer"}
    assert not [w for w in recwarn if "module by module" in str(w.message)]


@needs_engine
def test_a_hook_on_every_module_still_counts_when_a_counter_is_on():
    model, (xs, ys), seen = small_model(**ENGINE), prompt(), []
    with FlopCounterMode(display=False):
        model(xs, ys)
        handle = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: seen.append(type(module))
        )
        try:
            with pytest.warns(UserWarning, match="module by module"):
                model(xs, ys)
        finally:
            handle.remove()
    assert seen.count(torch.nn.LayerNorm) == 3 * model.config.n_loops


SCRIPT = """
import sys, torch
from looped_fast import LoopedTransformer, ModelConfig
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
model = LoopedTransformer(ModelConfig(n_dims=3, n_embd=32, n_head=4, n_loops=3, window=2))
xs, ys = torch.randn(2, 5, 3), torch.randn(2, 5)
{before}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    {counted}
print(counter.get_total_flops())
"""
FIRST = {
    "the first call": ("", "model(xs, ys)", 3, 0),
    "a backward after the import": ("total = model(xs, ys).sum()", "total.backward()", 0, 2),
}


@needs_engine
@pytest.mark.parametrize(("before", "counted", "forward", "backward"), FIRST.values(), ids=FIRST)
def test_the_first_counter_of_a_process_counts(before, counted, forward, backward):
    """Importing the package does not import the counter, nor Triton with it."""
    script = SCRIPT.format(before=before, counted=counted)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    blocks = loop_flops(2, 10, 32, 1, forward, backward)
    read_out = 2 * 2 * 2 * 10 * 32 * (2 if backward else 1)
    read_in = 2 * 2 * 10 * 3 * 32
    assert done.stdout.split() == [str(int(blocks + read_out + read_in))], done.stderr
