"""The interpreted kernel that assembles and embeds a prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import NO_TRITON

from looped_fast import ops
from looped_fast.ops import prompt, reference

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)


@pytest.mark.parametrize(("B", "n", "d"), [(3, 7, 5), (1, 1, 1), (2, 9, 20)])
def test_the_embedded_prompt_and_its_gradients_are_those_of_plain_pytorch(B, n, d):
    xs, ys, weight, bias = (
        torch.randn(B, n, d),
        torch.randn(B, n),
        torch.randn(64, d),
        torch.randn(64),
    )
    leaves = [t.requires_grad_() for t in (xs, ys, weight, bias)]
    grad = torch.randn(B, 2 * n, 64)
    fast = ops.read_in(*leaves, backend="triton")
    plain = reference.read_in(*leaves)
    assert fast.grad_fn.name() != plain.grad_fn.name()
    torch.testing.assert_close(fast, plain)
    for mine, theirs in zip(
        torch.autograd.grad(fast, leaves, grad), torch.autograd.grad(plain, leaves, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


def test_the_read_in_passes_opcheck():
    leaves = [torch.randn(2, 3, 5), torch.randn(2, 3), torch.randn(64, 5), torch.randn(64)]
    arguments = [t.requires_grad_() for t in leaves]
    torch.library.opcheck(torch.ops.looped_fast.read_in.default, (*arguments, "triton"))


def test_gradients_of_data_are_computed_only_where_asked_for():
    xs, ys, weight = torch.randn(2, 3, 5), torch.randn(2, 3), torch.randn(64, 5)
    context = SimpleNamespace(
        saved_tensors=(xs, ys, weight), needs_input_grad=(False, False, True, True)
    )
    d_xs, d_ys, *_ = prompt._backward(context, torch.randn(2, 6, 64))
    assert d_xs is None
    assert d_ys is None
