"""One contender's training step or inference call, ready to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import Case, Contender
from looped_fast import LoopedTransformer, reference


class Workload:
    """A training step (forward, loss, backward, Adam) or an inference call.

    Parameters and prompts depend on the case alone, so results of contenders can be compared.
    """

    def __init__(
        self, case: Case, contender: Contender, mode: str, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        self.mode = mode
        self.bf16 = contender.precision == "bf16"
        self.model = LoopedTransformer(case.config(), backend=contender.backend).to(dtype)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.predict: Callable[..., Tensor] = self.model
        if contender.compiled == "model":
            self.predict = torch.compile(self.model, dynamic=False)
        self.xs = torch.randn(case.batch, case.n_points, case.n_dims).to(dtype)
        self.ys = torch.randn(case.batch, case.n_points).to(dtype)

    def __call__(self) -> None:
        """Do one such step or call."""
        if self.mode == "inference":
            self.forward()
            return
        self.optimizer.zero_grad()
        self.forward_backward()
        self.optimizer.step()

    def forward(self) -> Tensor:
        """The last prediction, [1, B, n], without gradient."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.predict(self.xs, self.ys, window=1)

    def forward_backward(self) -> Tensor:
        """All predictions of the window, [T, B, n]; leaves gradients in the parameters."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            predictions = self.predict(self.xs, self.ys)
            loss = (predictions - self.ys).square().mean()
        loss.backward()
        return predictions.detach()


@contextlib.contextmanager
def fresh_compiler(contender: Contender) -> Iterator[None]:
    """Inside, nothing compiled before is used, and the reference's step is compiled if asked."""
    torch.compiler.reset()
    step: Callable[..., Tensor] = reference.step
    if contender.compiled == "step":
        step = torch.compile(reference.step, dynamic=False, fullgraph=True)
    with mock.patch.object(reference, "step", step):
        yield
