"""One contender's training step or inference call, ready to run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Contender
from looped_fast import LoopedTransformer
from looped_fast.ops import compiled_backend
from looped_fast.ops.graphs import graphs_on


class Workload:
    """A training step (forward, loss, backward, Adam) or an inference call.

    Parameters and prompts depend only on the case, so results of contenders can be compared.
    """

    def __init__(
        self,
        case: Case,
        contender: Contender,
        mode: str,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.case, self.contender, self.mode = case, contender, mode
        self.device = device
        self.bf16 = contender.precision == "bf16"
        self.fused_loss = contender.fused_loss
        cuda_graphs = "on" if contender.graphs else "off"
        model = LoopedTransformer(
            case.config(),
            contender.backend,
            recompute=contender.recompute,
            attention=contender.attention,
            cuda_graphs=cuda_graphs,
        )
        xs, ys = (
            torch.randn(case.batch, case.n_points, case.n_dims),
            torch.randn(case.batch, case.n_points),
        )
        self.model = model.to(device, dtype)
        self.xs, self.ys = xs.to(device, dtype), ys.to(device, dtype)
        self.graphs = graphs_on(torch.device(device), cuda_graphs)
        fused = device == "cuda" or contender.graphs
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), fused=fused or None, capturable=contender.graphs
        )
        self.predict: Callable[..., Tensor] = self.model
        if contender.whole_model:
            self.predict = torch.compile(self.model, dynamic=False, mode=contender.compile_mode)

    def __call__(self) -> None:
        """Run one step or call."""
        if self.mode == "inference":
            self.forward()
        else:
            self.graphs.run("step", self._step)

    def forward(self, window: int = 1) -> Tensor:
        """The last predictions, [window, B, n], without gradient."""
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.predict(self.xs, self.ys, window=window)

    def forward_backward(self) -> Tensor | None:
        """Compute gradients of the parameters; return predictions if the loss has them."""
        return self.graphs.run("forward and backward", self._forward_backward)

    def _forward_backward(self) -> Tensor | None:
        self.optimizer.zero_grad()
        predictions = None
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            if self.fused_loss:
                loss = self.model.loss(self.xs, self.ys)
            else:
                predictions = self.predict(self.xs, self.ys)
                loss = (predictions - self.ys).square().mean()
        loss.backward()
        return None if predictions is None else predictions.detach()

    def _step(self) -> None:
        self._forward_backward()
        self.optimizer.step()


def forget_compiled() -> None:
    """Drop all that torch.compile compiled in this process."""
    compiled_backend.empty_cache()
    torch.compiler.reset()
