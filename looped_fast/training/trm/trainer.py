"""``TRMTrainer``: deep supervision of a Tiny Recursive Model on a stream of puzzles.

Each puzzle of a batch has its own count of supervision steps. A training step is one supervision
step of every puzzle: the states that it leaves, without gradient, are where the next one starts. A
puzzle that halts is replaced by a new one.

Source: ``pretrain.py`` and ``TinyRecursiveReasoningModel_ACTV1`` of TinyRecursiveModels.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.evaluation.puzzles import Accuracy, solve_steps
from looped_fast.model import Carry, TinyRecursiveModel, TRMOutput
from looped_fast.ops.reference import AUTOCAST_DTYPES
from looped_fast.tasks.sampling import batch_generator
from looped_fast.tasks.sudoku import PuzzleBatch
from looped_fast.training import checkpoint, distributed
from looped_fast.training.checkpoint_check import check_weights
from looped_fast.training.curriculum import learning_rate
from looped_fast.training.fit import Fitting
from looped_fast.training.step import available_precision
from looped_fast.training.trm.config import TRMTrainConfig
from looped_fast.training.trm.loss import Loss, supervision_loss

_EXPLORATION = -5  # random stream beside those of batches, whose ranks are not negative
_PER_STEP = ("loss", "cell_loss", "halt_loss", "grad_norm")
_PER_PUZZLE = ("cells_right", "solved", "supervision_steps")


class Sequences(nn.Module):
    """The puzzles that are being solved, and sums for the next log line: state of the run.

    A module for its ``state_dict``; all are buffers.
    """

    inputs: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    z_H: Tensor  # [B, n_tokens, D]
    z_L: Tensor
    n_steps: Tensor  # [B], supervision steps taken
    halted: Tensor  # [B] bool, replaced at the next step
    sums: Tensor  # [8]: steps, sums of _PER_STEP; puzzles that halted, sums of _PER_PUZZLE

    def __init__(self, batch_size: int, seq_len: int, carry: Carry) -> None:
        super().__init__()
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        state: dict[str, Tensor] = {
            "inputs": tokens,
            "labels": tokens.clone(),
            "z_H": carry.z_H,
            "z_L": carry.z_L,
            "n_steps": torch.zeros(batch_size, dtype=torch.int64),
            "halted": torch.ones(batch_size, dtype=torch.bool),
            "sums": torch.zeros(2 + len(_PER_STEP + _PER_PUZZLE), dtype=torch.float64),
        }
        for name, tensor in state.items():
            self.register_buffer(name, tensor)


class TRMTrainer(Fitting):
    """Trains ``config`` in ``run_dir``, from the start or from a checkpoint.

    A resumed run ends bit-identical to an uninterrupted one on the same machine with as many
    threads.

    Args:
        config: all settings.
        run_dir: an existing folder for checkpoints and metrics.
        resume: a checkpoint of this run to continue from.

    Raises:
        CheckpointError: ``resume`` is damaged, or of another model.
        ValueError: a device or backend can't be used, the puzzles can't be found, or torchrun
            started several processes.
    """

    config: TRMTrainConfig
    model: TinyRecursiveModel
    remedies = ("a lower --lr", "more --warmup-steps")

    def __init__(
        self,
        config: TRMTrainConfig,
        run_dir: Path,
        resume: checkpoint.Checkpoint | None = None,
    ) -> None:
        self.processes = distributed.single_process()
        self.config, self.run_dir = config, run_dir
        self.device = distributed.resolve_device(config.device)
        self.task = config.make_task()
        torch.manual_seed(config.seed)
        self.model_config = config.model_config(self.task)
        self.model = TinyRecursiveModel(self.model_config, config.backend).to(self.device)
        self.precision = available_precision(
            config, self.device, lambda p: self.model.describe_call(config.batch_size, precision=p)
        )
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        carry = self.model.initial_carry(config.batch_size)
        self.sequences = Sequences(config.batch_size, self.task.seq_len, carry).to(self.device)
        settings: dict[str, Any] = {
            "lr": config.lr,
            "betas": (0.9, config.beta2),
            "weight_decay": config.weight_decay,
            "fused": self.device.type in ("cpu", "cuda"),
        }
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)
        self.step = 0
        self._saved_step: int | None = None
        if resume is not None:
            self._restore(resume)
        for group in self.optimizer.param_groups:
            group.update(settings)  # replaces those of a checkpoint

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        checkpoint.restore_into(saved, self.model, self.optimizer)
        self.average.load_state_dict(saved.model_state)
        state = self._run_state()
        hint = "Keep the run's --task, --batch-size and sizes of the model"
        check_weights(saved.path / checkpoint.TRAINER, saved.run_state, state, hint)
        state.load_state_dict(saved.run_state)
        self.step = self._saved_step = saved.step

    def _run_state(self) -> nn.Module:
        """What a checkpoint holds besides averaged weights and optimizer, by name."""
        return nn.ModuleDict({"weights": self.model, "sequences": self.sequences})

    def autocast(self) -> AbstractContextManager:
        """Autocast to ``self.precision``."""
        dtype = AUTOCAST_DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def training_step(self) -> None:
        """Replace puzzles that halted, and take one supervision step of all, with its update."""
        config, now = self.config, self.sequences
        self._replace_halted()
        output, loss = self._forward()
        loss.total.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        now.z_H.copy_(output.carry.z_H)
        now.z_L.copy_(output.carry.z_L)
        now.n_steps += 1
        now.halted.copy_(self._halting(output.q_halt.detach()))
        self._add_to_sums((loss.total, loss.cells, loss.halting, norm), loss.right)
        self.step += 1

    def _replace_halted(self) -> None:
        config, now = self.config, self.sequences
        new = self.task.training_batch(config.batch_size, config.seed, self.step)
        carry = self.model.initial_carry(config.batch_size)
        fresh = {"inputs": new.inputs, "labels": new.labels, "z_H": carry.z_H, "z_L": carry.z_L}
        for name, values in fresh.items():
            current = getattr(now, name)
            halted = now.halted.view(-1, *(1,) * (current.dim() - 1))
            current.copy_(torch.where(halted, values.to(self.device), current))
        now.n_steps.masked_fill_(now.halted, 0)

    def _forward(self) -> tuple[TRMOutput, Loss]:
        now = self.sequences
        with self.autocast():
            output = self.model(now.inputs, Carry(now.z_H, now.z_L), self._no_id)
        return output, supervision_loss(output, now.labels)

    @property
    def _no_id(self) -> Tensor:
        """The one identifier that all puzzles have."""
        return torch.zeros_like(self.sequences.n_steps)

    @torch.no_grad()
    def _update_average(self) -> None:
        averages: list[Tensor] = [*self.average.parameters()]
        weights: list[Tensor] = [*self.model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.config.ema_rate)

    def _halting(self, q_halt: Tensor) -> Tensor:
        """Which puzzles halt: by q_halt, or at the last step; [B] bool.

        Exploration: with a small probability a puzzle may not halt before a random step.
        """
        config, n_steps = self.config, self.sequences.n_steps
        most = config.halt_max_steps
        generator = batch_generator(config.seed, self.step, _EXPLORATION, "cpu")
        explores = torch.rand(q_halt.shape, generator=generator) < config.halt_exploration_prob
        least = torch.randint(min(2, most), most + 1, q_halt.shape, generator=generator) * explores
        return ((q_halt > 0) | (n_steps >= most)) & (n_steps >= least.to(self.device))

    def _add_to_sums(self, means: tuple[Tensor, ...], right: Tensor) -> None:
        now = self.sequences
        counts = (right.double().mean(-1), right.all(-1), now.n_steps)
        halted = [(values * now.halted).sum() for values in (torch.ones_like(now.n_steps), *counts)]
        one = torch.ones((), device=self.device)
        now.sums += torch.stack([x.detach().double() for x in (one, *means, *halted)])

    def _read_sums(self) -> dict[str, float]:
        sums = self.sequences.sums.tolist()
        n_steps, n_halted = sums[0], sums[1 + len(_PER_STEP)]
        values = {n: x / n_steps for n, x in zip(_PER_STEP, sums[1:], strict=False) if n_steps}
        if not all(math.isfinite(x) for x in values.values()):
            what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            raise self._non_finite(f"{what} at step {self.step}")
        of_puzzles = zip(_PER_PUZZLE, sums[-len(_PER_PUZZLE) :], strict=True)
        return values | {name: x / n_halted for name, x in of_puzzles if n_halted}

    def _reset_sums(self) -> None:
        self.sequences.sums.zero_()

    def _describe_step(self, steps_per_s: float) -> dict[str, Any]:
        return {"lr": learning_rate(self.config, self.step - 1), "steps_per_s": steps_per_s}

    def _progress(self, values: dict[str, Any]) -> str:
        return f"loss {values['loss']:.4g}, solved {values.get('solved', 0):.1%}"

    def evaluation(self) -> dict[str, Any]:
        """Accuracy on ``eval_puzzles``, as in ``evaluate``."""
        puzzles = self.task.evaluation_batch(self.config.eval_puzzles, self.config.seed)
        accuracy = self.evaluate(puzzles)
        return {f"eval_{name}": value for name, value in accuracy.to_dict().items()}

    def evaluate(self, puzzles: PuzzleBatch) -> Accuracy:
        """Accuracy of the averaged weights on ``puzzles``."""
        with self.autocast():
            return solve_steps(self.average, puzzles)

    def save(self) -> None:
        """Write a checkpoint of this step unless there is one; raises for non-finite numbers."""
        if self._saved_step == self.step:
            return
        self._read_sums()  # raises when not finite
        self._check_update()
        checkpoint.save(
            self.run_dir,
            self.step,
            self.model,
            self.optimizer,
            config=self.config.to_dict(),
            meta={"model": self.model_config.to_dict()},
            average=self.average,
            run_state=self._run_state().state_dict(),
            keep=self.config.keep,
        )
        self._saved_step = self.step

    def estimate_seconds(self) -> float:
        """Estimate seconds for the rest of the run from two trial steps; no weights change."""
        seconds = math.inf
        state = copy.deepcopy(self.sequences.state_dict())
        self._replace_halted()
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            self._forward()[1].total.backward()
            self.optimizer.zero_grad(set_to_none=True)
            seconds = min(seconds, time.perf_counter() - started)
        self.sequences.load_state_dict(state)
        return seconds * (self.config.steps - self.step)
