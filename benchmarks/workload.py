"""One contender's training step or inference call, ready to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Contender, PuzzleCase
from looped_fast import LoopedTransformer, TinyRecursiveModel
from looped_fast.ops import compiled_backend
from looped_fast.ops.graphs import graphs_on


def model_of(
    case: Case | PuzzleCase, contender: Contender
) -> LoopedTransformer | TinyRecursiveModel:
    """The model of a case as a contender runs it, with random parameters."""
    kind = TinyRecursiveModel if isinstance(case, PuzzleCase) else LoopedTransformer
    return kind(
        case.config(),
        contender.backend,
        recompute=contender.recompute,
        attention=contender.attention,
        cuda_graphs="on" if contender.graphs else "off",
    )


class Workload:
    """A training step (forward, loss, backward, Adam) or an inference call.

    Parameters and prompts depend only on the case, so results of contenders can be compared.
    """

    def __init__(
        self,
        case: Case | PuzzleCase,
        contender: Contender,
        mode: str,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.case, self.contender, self.mode = case, contender, mode
        self.device = device
        self.bf16 = contender.precision == "bf16"
        self.model = model_of(case, contender).to(device, dtype)
        self.inputs, self.targets = _inputs_and_targets(case, dtype, device)
        self.graphs = graphs_on(torch.device(device), "on" if contender.graphs else "off")
        fused = device == "cuda" or contender.graphs
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), fused=fused or None, capturable=contender.graphs
        )
        self.predict: Callable[..., Any] = self.model
        if contender.whole_model:
            self.predict = torch.compile(self.model, dynamic=False, mode=contender.compile_mode)

    def __call__(self) -> None:
        """Run one step or call."""
        if self.mode == "inference":
            self.forward()
        else:
            self.graphs.run("step", self._step)

    def forward(self, of_window: bool = False) -> Tensor:
        """The last predictions, or those of the window, without gradient.

        [steps, B, n], or logits of the answer, [B, S, V].
        """
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            if isinstance(self.case, PuzzleCase):
                return self.predict(*self.inputs).logits
            return self.predict(*self.inputs, window=self.case.window if of_window else 1)

    def forward_backward(self) -> Tensor | None:
        """Compute gradients of the parameters; return predictions if the loss has them."""
        return self.graphs.run("forward and backward", self._forward_backward)

    def _forward_backward(self) -> Tensor | None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss, predictions = self._loss()
        loss.backward()
        return None if predictions is None else predictions.detach()

    def _loss(self) -> tuple[Tensor, Tensor | None]:
        """The loss, and the predictions unless it comes without."""
        if isinstance(self.case, PuzzleCase):
            _, logits, q_halt, _ = self.predict(*self.inputs)
            answer = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
            right = (logits.argmax(-1) == self.targets).all(-1).to(q_halt.dtype)
            return answer + F.binary_cross_entropy_with_logits(q_halt, right) / 2, logits
        if self.contender.fused_loss:
            assert isinstance(self.model, LoopedTransformer)
            return self.model.loss(*self.inputs), None
        predictions = self.predict(*self.inputs)
        return (predictions - self.targets).square().mean(), predictions

    def _step(self) -> None:
        self._forward_backward()
        self.optimizer.step()


def _inputs_and_targets(
    case: Case | PuzzleCase, dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """What the model is called with, and what it should answer."""
    if isinstance(case, PuzzleCase):
        shape = case.batch, case.seq_len
        puzzles, answers = (torch.randint(case.vocab_size, shape, device=device) for _ in range(2))
        identifiers = torch.zeros(case.batch, dtype=torch.int64, device=device)
        return (puzzles, None, identifiers if case.puzzle_emb_len else None), answers
    xs = torch.randn(case.batch, case.n_points, case.n_dims).to(device, dtype)
    ys = torch.randn(case.batch, case.n_points).to(device, dtype)
    return (xs, ys), ys


def forget_compiled() -> None:
    """Drop all that torch.compile compiled in this process."""
    compiled_backend.empty_cache()
    torch.compiler.reset()
