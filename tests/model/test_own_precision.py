"""``accelerate`` of our own model: its precision reaches everything that runs the loop."""

import pytest
import torch
from conftest import prompt, small_model

from looped_fast import accelerate, compat, restore

CALLS = {
    "forward": lambda m, xs, ys: m(xs, ys),
    "loss": lambda m, xs, ys: m.loss(xs, ys),
    "states": lambda m, xs, ys: m.states(xs, ys),
    "step": lambda m, xs, ys: m.step(torch.ones(2, 10, 16), m.embed(xs, ys)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_precision_reaches_every_call(call, backend):
    model, arguments = small_model(), prompt()
    single = call(model, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(model, *arguments)
    accelerate(model, backend, precision="bf16")
    assert torch.equal(call(model, *arguments), expected)
    assert not torch.equal(expected, single)
    restore(model)
    assert torch.equal(call(model, *arguments), single)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_precision_fp32_ignores_autocast(call):
    model, arguments = small_model(), prompt()
    expected = call(model, *arguments)
    accelerate(model, precision="fp32")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(model, *arguments), expected)


def test_gradients_of_the_loss_are_those_under_autocast():
    results = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model, arguments = small_model(), prompt()
        if accelerated:
            accelerate(model, precision="bf16").loss(*arguments).backward()
        else:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(*arguments)
            loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_official_model_on_our_op_takes_a_precision():
    conf = type("Conf", (), {"family": "gpt2_loop", "n_dims": 3, "n_positions": 8, "n_embd": 16,
                             "n_layer": 1, "n_head": 2})  # fmt: skip
    model, arguments = compat.build_model(conf), (*prompt(), 0, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*arguments)
    assert not torch.equal(model(*arguments)[0], expected[0])
    accelerate(model, precision="bf16")
    assert all(map(torch.equal, model(*arguments), expected))
