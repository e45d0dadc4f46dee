"""The loop around training steps: log, evaluate, save checkpoints, stop cleanly."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from looped_fast.training import checkpoint, distributed, lock
from looped_fast.training.log import MetricsLog


class NonFiniteError(RuntimeError):
    """The loss, its gradient, or what an update made of the weights is NaN or Inf."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the run is checkpointed. ``signum`` is the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Fitting(ABC):
    """Trains to ``config.steps`` by the steps that a subclass takes.

    Attributes:
        config: settings, among them steps, log_every, eval_every, save_every, keep and wandb.
        step: completed steps.
        run_dir: an existing folder for checkpoints and metrics.
        precision: operands of matrix products; ``fp32``, ``bf16`` or ``fp16``.
        remedies: what an error of a diverged run suggests.
    """

    config: Any
    processes: distributed.Processes
    device: torch.device
    model: Any  # a module
    optimizer: Any
    step: int
    run_dir: Path
    precision: str
    remedies: tuple[str, ...] = ("a lower --lr", "--clip-grad-norm 1", "--warmup-steps 1000")
    _signal = 0  # number of the signal received

    @abstractmethod
    def training_step(self) -> None:
        """Take one optimizer step on the next batch."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint of this step unless there is one; raises for non-finite numbers."""

    @abstractmethod
    def evaluation(self) -> dict[str, Any]:
        """What ``metrics.jsonl`` gets of an evaluation; runs in the main process alone."""

    def measure_backends(self) -> str | None:
        """Time backends before the first step; return a line that says how, or None."""
        return None

    @abstractmethod
    def _read_sums(self) -> dict[str, float]:
        """Means over steps since the last log line. Raises NonFiniteError."""

    @abstractmethod
    def _reset_sums(self) -> None:
        """Start the next log line."""

    @abstractmethod
    def _describe_step(self, steps_per_s: float) -> dict[str, Any]:
        """What a log line has besides ``_read_sums``."""

    @abstractmethod
    def _progress(self, values: dict[str, Any]) -> str:
        """What the progress bar shows of a log line."""

    def fit(self) -> None:
        """Train to ``config.steps``, with a progress bar. Only the main thread handles signals.

        Raises:
            NonFiniteError: the loss, the gradient or the weights are NaN or Inf; that state is not
                checkpointed. (SystemExit with several processes, see
                ``Processes.failing_together``.)
            Interrupted: SIGINT or SIGTERM came; the step was finished and checkpointed. With
                several processes all stop after the same step, whichever got the signal.
            InUseError: another process writes to the run's folder.
            RuntimeError: the run's log is damaged.
        """
        with contextlib.ExitStack() as held:
            with self.processes.failing_together():
                if self.processes.is_main:
                    held.enter_context(lock.hold(self.run_dir))
                    checkpoint.tidy(self.run_dir, self.config.keep)
            self._fit_in_locked_folder()

    def _fit_in_locked_folder(self) -> None:
        config = self.config
        if measured := self.measure_backends():
            print(measured)
        with self.processes.failing_together():
            log = None
            if self.processes.is_main:
                log = MetricsLog(self.run_dir, self.step, config.wandb, config.to_dict())
        handlers = self._install_handlers()
        try:
            # A terminal shows a live bar; a log file gets a line every half minute.
            interval = 0.1 if sys.stderr.isatty() else 30
            with tqdm(
                total=config.steps, initial=self.step, unit="step", smoothing=0.05,
                mininterval=interval, maxinterval=2 * interval, disable=not self.processes.is_main,
            ) as bar:  # fmt: skip
                self._fit(log, bar)
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            if log is not None:
                log.close()

    def _fit(self, log: Any, bar: tqdm) -> None:  # ``log`` is None outside of the main process
        config = self.config
        logged_at, logged_step = time.perf_counter(), self.step
        while self.step < config.steps:
            self.training_step()
            bar.update()
            # Reading the loss stalls a GPU's stream, but costs nothing on a CPU.
            reads = self.device.type == "cpu" or self._is_due(config.log_every)
            if reads:
                values = self._read_sums()
                if self._is_due(config.log_every):
                    now = time.perf_counter()
                    rate = (self.step - logged_step) / (now - logged_at)
                    logged_at, logged_step = now, self.step
                    values |= self._describe_step(rate)
                    with self.processes.failing_together():
                        if log is not None:
                            log.write(self.step, values)
                    self._reset_sums()
                    bar.set_postfix_str(self._progress(values), refresh=False)
            if self._is_due(config.eval_every):
                self._check_update()
                self.processes.broadcast(lambda: log.write(self.step, self.evaluation()))
            signum = 0
            if reads or self.processes.world_size == 1:  # a gather waits for the slowest
                signum = int(max(self.processes.gather(self._signal))[0])
            if self._is_due(config.save_every) or signum:
                with self.processes.failing_together():
                    if log is not None:
                        log.check_folder()
                self.save()
            if signum:
                raise Interrupted(signum)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _check_update(self) -> None:
        """Raise NonFiniteError if the last update made a weight or a moment NaN or Inf."""
        fault = checkpoint.non_finite_state(self.model, self.optimizer)
        with self.processes.failing_together():
            if fault is not None:
                raise self._non_finite(f"{fault} after step {self.step}")

    def _non_finite(self, what: str) -> NonFiniteError:
        good = checkpoint.latest(self.run_dir)
        remedies = [*self.remedies]
        if self.precision != "fp32":
            remedies.append("--amp off")
        return NonFiniteError(
            f"{what}. No checkpoint was written of it; the last good one is {good or 'none'}. "
            f"Likely remedies: {', '.join(remedies)}"
        )

    def _install_handlers(self) -> dict[int, Any]:
        """Handle SIGINT and SIGTERM, and return the handlers before. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "training outside of the main thread, where Python handles no signals: SIGINT and "
                "SIGTERM end it without a checkpoint of its last step",
                stacklevel=3,
            )
            return {}
        return {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signal = signum
        # A second signal ends a single process at once. Each of several processes may get one from
        # the terminal and another from torchrun, which kills them itself if they take too long.
        if self.processes.world_size == 1:
            signal.signal(signum, signal.SIG_DFL)
