"""``Trainer``: the training loop over steps of ``Stepper``, its sums, evaluations, checkpoints."""

from __future__ import annotations

import math
import reprlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from looped_fast.evaluation import model_errors
from looped_fast.ops.flops import loop_flops
from looped_fast.training import backend_autotune, checkpoint, distributed
from looped_fast.training.checkpoint_read import damaged
from looped_fast.training.config import TrainConfig
from looped_fast.training.curriculum import Stage
from looped_fast.training.fit import Fitting, Interrupted, NonFiniteError
from looped_fast.training.step import Start, Stepper

__all__ = ["Interrupted", "NonFiniteError", "Trainer", "step_flops"]

_LEAST_SCALE = 2.0**-10  # of the fp16 loss: below it after 27 overflows in a row from 2^16


def _unlogged(saved: checkpoint.Checkpoint) -> tuple[int, torch.Tensor] | None:
    """Steps since the last log line, and their sums [processes, 3]; None in older checkpoints."""
    n_processes, entry = saved.meta.get("processes", 1), saved.meta.get("unlogged")
    if type(n_processes) is not int or n_processes < 1:
        fault = f"processes = {reprlib.repr(n_processes)}, and a count is needed"
        raise damaged(saved.path / checkpoint.INDEX, f"has meta.{fault}")
    if entry is None:
        return None
    try:
        steps, sums = entry["steps"], torch.tensor(entry["sums"], dtype=torch.float64)
        valid = type(steps) is int and 0 <= steps <= saved.step and sums.isfinite().all()
        if not (valid and sums.shape == (n_processes, 3)):
            raise ValueError("steps is a count, and sums are three numbers per process")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        fault = f"has a wrong entry meta.unlogged ({error!r})"
        raise damaged(saved.path / checkpoint.INDEX, fault) from None
    return steps, sums


class Trainer(Stepper, Fitting):
    """Trains ``config`` in ``run_dir``, from the start or from a checkpoint.

    A resumed run ends bit-identical to an uninterrupted one on the same machine with as many
    threads and processes. With several processes only the main one evaluates and writes.

    Args:
        config: all settings.
        run_dir: an existing folder for checkpoints and metrics.
        resume, processes, start: as in ``Stepper``.

    Raises:
        CheckpointError, ValueError: as in ``Stepper``.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        resume: checkpoint.Checkpoint | None = None,
        processes: distributed.Processes | None = None,
        start: Start | None = None,
    ) -> None:
        unlogged = None if resume is None else _unlogged(resume)
        super().__init__(config, resume, processes, start)
        self.run_dir = run_dir
        self._saved_step: int | None = self.step if resume is not None else None
        if unlogged is not None:
            self._steps_in_sums, sums = unlogged
            same = len(sums) == self.processes.world_size
            self._sums.copy_(sums[self.processes.rank] if same else sums.mean(0))

    def measure_backends(self) -> str | None:
        """Time the backends on this GPU unless their times are known; ``auto`` selects by them.

        The step that occurs most often in the rest of this run is timed. Nothing is timed if steps
        are not replayed as CUDA graphs, if a backend or attention is forced, with ``recompute``,
        or under ``torch.use_deterministic_algorithms(True)``.

        Returns:
            A line with the times, or None if nothing was measured.
        """
        config = self.config
        forced = config.backend != "auto" or config.attention != "auto" or config.recompute
        fixed = forced or torch.are_deterministic_algorithms_enabled()
        if fixed or self.graphs.unsupported is not None or self.step >= config.steps:
            return None
        stride = max(1, (config.steps - self.step) // 1000)
        steps = range(self.step, config.steps, stride)
        stages = Counter(self.curriculum.at(step)[1:] for step in steps)
        ((n_points, n_loops), count), *_ = stages.most_common(1)
        self._set_inputs()
        xs, ys = self._batch(n_points)

        def training_step() -> None:
            self._loss(n_points, n_loops)[0].backward()
            self.optimizer.zero_grad(set_to_none=True)

        def inference() -> None:
            with torch.no_grad(), self.autocast():
                self.model(xs, ys, n_loops)

        def milliseconds(work: Callable[[], None]) -> float:
            try:
                return backend_autotune.replay_milliseconds(work, self.device, self._generator)
            except Exception:
                self._drop_half_step()
                raise

        call = self.model.describe_call(config.batch_size, n_points, self.precision, True)
        works = {True: training_step, False: inference}
        return backend_autotune.measure(call, count * stride, self.model, works, milliseconds)

    def evaluation(self) -> dict[str, Any]:
        """Errors on ``eval_prompts``, as in ``evaluate``."""
        return {"errors": self.evaluate(self.config.eval_prompts)}

    def evaluate(self, n_prompts: int) -> dict[str, list[float]]:
        """Relative error by position, {loop count: [n]}, at each of ``loop_counts``."""
        errors = model_errors(
            self.model, self.task, self.loop_counts(), n_prompts, self.config.n_points,
            seed=self.config.seed, autocast=self.autocast,
        )  # fmt: skip
        return {str(n_loops): error.tolist() for n_loops, error in errors.items()}

    def loop_counts(self) -> list[int]:
        """Loop counts to evaluate at: T, b and 2b of a looped model; others have one."""
        b = self.config.n_loops
        return sorted({self.config.window, b, 2 * b}) if self.config.model == "looped" else [b]

    def save(self) -> None:
        """Write a checkpoint of this step unless there is one; raises for non-finite numbers."""
        if self._saved_step == self.step:
            return
        self._read_sums()  # raises when not finite
        self._check_update()
        meta = {
            "curriculum": self.curriculum.at(self.step)._asdict(),
            "processes": self.processes.world_size,
            "unlogged": {
                "steps": self._steps_in_sums,
                "sums": self.processes.gather(*self._sums.tolist()),
            },
        }
        self.processes.broadcast(
            lambda: checkpoint.save(
                self.run_dir,
                self.step,
                self.model,
                self.optimizer,
                config=self.config.to_dict(),
                meta=meta,
                scaler=self.scaler,
                keep=self.config.keep,
            )
        )
        self._saved_step = self.step

    def estimate_seconds(self) -> float:
        """Estimate seconds for the rest of the run, from two trial steps and a count of FLOPs.

        Each process runs the trial by itself, on its next batch; no weights change.
        """
        config = self.config
        seconds = math.inf
        self._set_inputs()
        _, n_points, n_loops = self.curriculum.at(self.step)
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            loss, _ = self._loss(n_points, n_loops)
            parameters = list(self.model.parameters())
            *_, gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradient.sum().item()  # waits for a GPU
            seconds = min(seconds, time.perf_counter() - started)
        stride = max(1, (config.steps - self.step) // 1000)
        steps = range(self.step, config.steps, stride)
        work = stride * sum(step_flops(config, self.curriculum.at(step)) for step in steps)
        return seconds * work / step_flops(config, self.curriculum.at(self.step))

    def _read_sums(self) -> dict[str, float]:
        """Means over processes and steps since the last log line. Raises NonFiniteError."""
        if not self._steps_in_sums:
            return {}
        means = (self._sums / self._steps_in_sums).tolist()
        loss, zero, norm = self.processes.mean(*means)  # over ranks, so all take the same branch
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE:
            norm = math.inf
        if not (math.isfinite(loss) and math.isfinite(norm)):
            first = self.step - (0 if self.device.type == "cpu" else self._steps_in_sums - 1)
            when = f"step {self.step}" if first == self.step else f"steps {first} to {self.step}"
            with self.processes.failing_together():
                raise self._non_finite(f"loss {loss}, gradient norm {norm} at {when}")
        values = {"loss": loss, "grad_norm": norm}
        # With few dimensions at the start, all sparse weights may be 0, and then so is y.
        return values | {"relative_error": loss / zero} if zero else values

    def _reset_sums(self) -> None:
        self._sums.zero_()
        self._steps_in_sums = 0

    def _describe_step(self, steps_per_s: float) -> dict[str, Any]:
        stage = self.curriculum.at(self.step - 1)
        tokens = self.processes.world_size * self.config.batch_size * 2 * stage.n_points
        return {
            "lr": self.learning_rate(self.step - 1),
            **stage._asdict(),
            "steps_per_s": steps_per_s,
            "tokens_per_s": steps_per_s * tokens,
        }

    def _progress(self, values: dict[str, Any]) -> str:
        relative = values.get("relative_error", math.nan)
        return (
            f"loss {values['loss']:.4g}, error/zero {relative:.3f}, "
            f"{values['tokens_per_s']:.0f} tokens/s"
        )


def step_flops(config: TrainConfig, stage: Stage) -> float:
    """Floating-point operations in the blocks of one training step at ``stage``."""
    S, window = 2 * stage.n_points, min(config.window, stage.n_loops)
    return loop_flops(
        config.batch_size, S, config.n_embd, config.n_layer, stage.n_loops, window, (S + 1) / 2
    )
