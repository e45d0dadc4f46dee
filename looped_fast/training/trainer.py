"""The training loop: sample, step, log, evaluate, checkpoint, stop cleanly."""

from __future__ import annotations

import functools
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from looped_fast import pretrained
from looped_fast.compat import load_official_checkpoint
from looped_fast.config import ModelConfig
from looped_fast.evaluation import model_errors
from looped_fast.model import LoopedTransformer
from looped_fast.ops import backends, graphs
from looped_fast.ops.reference import AUTOCAST_DTYPES
from looped_fast.tasks import Batch, FixedPrompts, batch_seed, draw_batch
from looped_fast.training import backend_autotune, checkpoint, distributed
from looped_fast.training.config import TrainConfig
from looped_fast.training.curriculum import Stage
from looped_fast.training.distributed import resolve_device
from looped_fast.training.log import MetricsLog, NoLog

_LEAST_SCALE = 2.0**-10  # of the fp16 loss; reached by 26 overflows in a row, from 2^16


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or Inf."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the run is checkpointed. ``signum`` is the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Trainer:
    """Trains ``config`` in ``run_dir``, from the start or from a checkpoint.

    The data of step i is a pure function of (seed, i, rank), so a resumed run ends bit-identical
    to an uninterrupted one on the same machine with as many threads and processes.

    Several processes each make a trainer and call the same methods. A step then takes the mean
    gradient over a batch of each; the main process alone evaluates and writes.

    On a GPU the first step of a curriculum stage (n_points, n_loops) runs as usual, the second
    is captured as a CUDA graph, and later ones are replays of it. What else changes from step to
    step (n_dims, learning rate, random numbers) is therefore kept on the device.

    Args:
        config: all settings.
        run_dir: an existing folder for checkpoints and metrics.
        resume: a checkpoint of this run to continue from.
        processes: those that train the model, from ``distributed.join``; this one by default.

    Raises:
        CheckpointError: ``resume`` is damaged or of another model.
        ValueError: a device or backend that can't be used, CUDA graphs required of several
            processes, or torchrun started several and ``processes`` is not given.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        resume: checkpoint.Checkpoint | None = None,
        processes: distributed.Processes | None = None,
    ) -> None:
        self.processes = distributed.alone() if processes is None else processes
        self.config = config
        self.run_dir = run_dir
        self.device = self.processes.own_device(resolve_device(config.device))
        self.task = config.make_task()
        self.curriculum = config.make_curriculum()
        torch.manual_seed(config.seed)
        model = LoopedTransformer(
            self._model_config(),
            config.backend,
            recompute=config.recompute,
            attention=config.attention,
            cuda_graphs="off",  # of inference, that is: evaluations are too rare for them
        )
        self.model = model.to(self.device)
        on_cpu = self.device.type == "cpu"  # where the fused Adam reads a double
        self._lr = torch.tensor(
            config.lr, dtype=torch.float64 if on_cpu else torch.float32, device=self.device
        )
        settings: dict[str, Any] = {
            "lr": self._lr,
            "betas": (0.9, config.beta2),
            "weight_decay": config.weight_decay,
            "fused": self.device.type in ("cpu", "cuda"),
            "capturable": self.device.type == "cuda",
        }
        self.optimizer = torch.optim.Adam(self.model.parameters(), **settings)
        self.amp, self.amp_note = self._available_amp()
        self.scaler = self._make_scaler()
        self.step = 0  # completed steps
        if resume is not None:
            checkpoint.restore_into(resume, self.model, self.optimizer, self.scaler)
            self.step = resume.step
        elif config.init_from is not None:
            self._init_from(Path(config.init_from))
        for group in self.optimizer.param_groups:
            group.update(settings)  # a checkpoint brought its own
        self._fixed_prompts = (
            FixedPrompts(
                self.task, config.train_prompts, config.n_points, config.batch_size,
                seed=config.seed, device=self.device, world_size=self.processes.world_size,
            )
            if config.train_prompts is not None
            else None
        )  # fmt: skip
        self._saved_step: int | None = self.step if resume is not None else None
        self._signal = 0  # the one that came
        self._sums = torch.zeros(3, device=self.device)  # of loss, mean y^2, gradient norm
        self._steps_in_sums = 0
        # With the learning rate, all that differs from step to step within a stage.
        self._generator = torch.Generator(self.device)
        self._n_dims = torch.zeros((), dtype=torch.int64, device=self.device)
        self._rows = torch.zeros(config.batch_size, dtype=torch.int64, device=self.device)
        self.graphs = graphs.graphs_on(
            self.device,
            config.cuda_graphs,
            lambda: self._generator,
            unsupported=(
                "several processes train the model" if self.processes.world_size > 1 else None
            ),
        )

    def _model_config(self) -> ModelConfig:
        return self.config.model_config()

    def _available_amp(self) -> tuple[str, str]:
        """``config.amp``, or "off" on a CPU where fp32 is the faster choice; and a note if so."""
        if self.device.type != "cpu" or self.config.amp == "off":
            return self.config.amp, ""
        size = (self.config.batch_size, self.config.n_points)
        asked = backends.select(self.model.describe_call(*size, self.config.amp))
        if self.config.amp == "bf16" and asked.chosen != "cpu":
            fp32 = backends.select(self.model.describe_call(*size, "fp32"))
            if fp32.chosen == "cpu":
                return "off", f"amp bf16 runs in fp32 here: {asked.reasons['cpu']}"
        return self.config.amp, ""

    def _init_from(self, path: Path) -> None:
        """Start from a checkpoint of ours (weights) or an official one (and where it stopped)."""
        if path.suffix != ".pt":
            found = pretrained.find_checkpoint(path)
            checkpoint.restore_into(checkpoint.load(found), self.model)
            return
        official = load_official_checkpoint(path)
        try:
            self.model.load_state_dict(official.model_state)
        except RuntimeError as error:
            raise checkpoint.CheckpointError(f"{path} is of another model: {error}") from None
        if official.optimizer_state is not None:
            # Adam's moments carry on; the settings of this run stay.
            groups = self.optimizer.state_dict()["param_groups"]
            state = official.optimizer_state["state"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if official.train_step is not None:
            self.step = official.train_step + 1

    def autocast(self) -> AbstractContextManager:
        """The precision of matrix products: what the settings ask for, if this machine has it."""
        dtype = AUTOCAST_DTYPES["fp32" if self.amp == "off" else self.amp]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def measure_backends(self) -> str | None:
        """Time the backends on this GPU, unless their times are known; ``auto`` goes by them.

        What is timed is the step that most of this run consists of. Nothing is where steps are not
        replayed as CUDA graphs, where a backend or who computes attention is forced, with
        ``recompute``, and under ``torch.use_deterministic_algorithms(True)``.

        Returns:
            A line that says the times, or None where nothing was measured.
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

        precision = "fp32" if self.amp == "off" else self.amp
        call = self.model.describe_call(config.batch_size, n_points, precision, True)
        works = {True: training_step, False: inference}
        return backend_autotune.measure(call, count * stride, self.model, works, milliseconds)

    def fit(self) -> None:
        """Train to ``config.steps``, with a progress bar.

        Raises:
            NonFiniteError: the loss or gradient is NaN or Inf; no checkpoint is written of it.
                (SystemExit with several processes, see ``Processes.together``.)
            Interrupted: SIGINT or SIGTERM came; the step was finished and checkpointed. With
                several processes all stop after the same step, whichever got the signal.
        """
        config = self.config
        if measured := self.measure_backends():
            print(measured)
        with self.processes.together():
            log = (
                MetricsLog(self.run_dir, self.step, config.wandb, config.to_dict())
                if self.processes.is_main
                else NoLog()
            )
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            # A log file gets a line every half minute, a terminal a live bar.
            interval = 0.1 if sys.stderr.isatty() else 30
            with tqdm(
                total=config.steps, initial=self.step, unit="step", smoothing=0.05,
                mininterval=interval, maxinterval=2 * interval, disable=not self.processes.is_main,
            ) as bar:  # fmt: skip
                self._fit(log, bar)
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            log.close()

    def _fit(self, log: MetricsLog | NoLog, bar: tqdm) -> None:
        config = self.config
        logged_at, logged_step = time.perf_counter(), self.step
        while self.step < config.steps:
            self.training_step()
            bar.update()
            # Reading the loss stalls a GPU's stream, and costs nothing on a CPU.
            looks = self.device.type == "cpu" or self._is_due(config.log_every)
            if looks:
                values = self._read_sums()
                if self._is_due(config.log_every):
                    now = time.perf_counter()
                    rate = (self.step - logged_step) / (now - logged_at)
                    logged_at, logged_step = now, self.step
                    values |= self._describe_step(rate)
                    with self.processes.together():
                        log.write(self.step, values)
                    self._reset_sums()
                    relative = values.get("relative_error", math.nan)
                    bar.set_postfix_str(
                        f"loss {values['loss']:.4g}, error/zero {relative:.3f}, "
                        f"{values['tokens_per_s']:.0f} tokens/s",
                        refresh=False,
                    )
            if self._is_due(config.eval_every):
                self.processes.on_main(
                    lambda: log.write(self.step, {"errors": self.evaluate(config.eval_prompts)})
                )
            signum = 0
            if looks or self.processes.world_size == 1:  # others would wait for the slowest
                signum = int(max(self.processes.gather(self._signal))[0])
            if self._is_due(config.save_every) or signum:
                self.save()
            if signum:
                raise Interrupted(signum)

    def training_step(self) -> None:
        """One optimizer step on the next batch."""
        self._set_inputs()
        _, n_points, n_loops = self.curriculum.at(self.step)
        self.graphs.run(
            (n_points, n_loops),
            functools.partial(self._update, n_points, n_loops),
            clean_up=self._drop_half_step,
        )
        self._steps_in_sums += 1
        self.step += 1

    def _set_inputs(self) -> None:
        """Put what the next step needs where ``_update`` and its graph read it."""
        self._lr.fill_(self.learning_rate(self.step))
        self._n_dims.fill_(self.curriculum.at(self.step).n_dims)
        rank = self.processes.rank
        if self._fixed_prompts is None:
            self._generator.manual_seed(batch_seed(self.config.seed, self.step, rank))
        else:
            rows = self._fixed_prompts.rows(self.step, rank)
            if self.device.type == "cuda":  # else the copy would wait for the step before
                rows = rows.pin_memory()
            self._rows.copy_(rows, non_blocking=True)

    def _update(self, n_points: int, n_loops: int) -> None:
        """The device's part of a step: no look at values here, all shapes from the arguments."""
        config = self.config
        loss, zero = self._loss(n_points, n_loops, self._averaging_loss)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if config.clip_grad_norm is None else config.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():  # it skipped this step if the gradient overflowed
            norm = norm.nan_to_num(posinf=0.0)
        self._sums += torch.stack((loss.detach(), zero, norm))

    @functools.cached_property
    def _averaging_loss(self) -> Callable[..., Tensor]:
        """``self.model.loss``, made to average gradients once every process is there."""
        config, (_, n_points, n_loops) = self.config, self.curriculum.at(0)
        averaging = self.processes.averaging(
            self.model,
            lambda loss: self._loss(n_points, n_loops, loss)[0],
            # The prompt enters before the first step alone, which may have no gradient.
            some_unused=config.injection == "none" and config.window < config.n_loops,
        )
        self._set_inputs()  # the trial used the generator
        return averaging

    def _drop_half_step(self) -> None:
        """After a capture that failed: gradients, scaler, and generator as before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        scaler = self._make_scaler()
        if self.scaler.is_enabled():
            scaler.load_state_dict(self.scaler.state_dict())
        self.scaler = scaler
        self._generator = torch.Generator(self.device)  # the other one may still be capturing
        self._set_inputs()

    def _make_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")

    def learning_rate(self, step: int) -> float:
        """Of training step ``step`` (from 0): linear warm-up, then constant or cosine to 0."""
        config = self.config
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        return config.lr * warmup * (decay if config.lr_decay == "cosine" else 1.0)

    def evaluate(self, n_prompts: int) -> dict[str, list[float]]:
        """Relative error by position, {loop count: [n]}, at T, b and 2b loops."""
        errors = model_errors(
            self.model, self.task, self.loop_counts(), n_prompts, self.config.n_points,
            seed=self.config.seed, autocast=self.autocast,
        )  # fmt: skip
        return {str(n_loops): error.tolist() for n_loops, error in errors.items()}

    def loop_counts(self) -> list[int]:
        """Where a looped model is evaluated: T, b and 2b loops. Others have one count."""
        b = self.config.n_loops
        return sorted({self.config.window, b, 2 * b}) if self.config.model == "looped" else [b]

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one or the numbers are bad."""
        if self._saved_step == self.step:
            return
        self._read_sums()  # raises when not finite
        stage, n_processes = self.curriculum.at(self.step), self.processes.world_size
        self.processes.on_main(
            lambda: checkpoint.save(
                self.run_dir,
                self.step,
                self.model,
                self.optimizer,
                config=self.config.to_dict(),
                meta={"curriculum": stage._asdict(), "processes": n_processes},
                scaler=self.scaler,
                keep=self.config.keep,
            )
        )
        self._saved_step = self.step

    def estimate_seconds(self) -> float:
        """Seconds that the rest of the run will take, from two trial steps and a count of FLOPs.

        The trial is on the next batch, by each process for itself, and changes nothing.
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

    def _loss(
        self, n_points: int, n_loops: int, loss: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """On the batch that ``_set_inputs`` chose, with that of predicting zero."""
        xs, ys = self._batch(n_points)
        window = min(self.config.window, n_loops)
        n_supervised = min(self.config.supervised_window, window)
        with self.autocast():
            value = (loss or self.model.loss)(xs, ys, n_loops, window, n_supervised)
        return value, ys.square().mean()

    def _batch(self, n_points: int) -> Batch:
        if self._fixed_prompts is not None:
            return self._fixed_prompts.take(self._rows, n_points, self._n_dims)
        return draw_batch(
            self.task, self.config.batch_size, n_points, self._generator, self._n_dims
        )

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _read_sums(self) -> dict[str, float]:
        """Means over processes and steps since the last log line. Raises NonFiniteError."""
        if not self._steps_in_sums:
            return {}
        means = (self._sums / self._steps_in_sums).tolist()
        loss, zero, norm = self.processes.mean(*means)  # of all, which so decide alike
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE:
            norm = math.inf
        if not (math.isfinite(loss) and math.isfinite(norm)):
            with self.processes.together():
                raise NonFiniteError(self._explain_non_finite(loss, norm))
        values = {"loss": loss, "grad_norm": norm}
        # With few dimensions at the start, sparse weights may all be 0, and y with them.
        return values | {"relative_error": loss / zero} if zero else values

    def _reset_sums(self) -> None:
        self._sums.zero_()
        self._steps_in_sums = 0

    def _explain_non_finite(self, loss: float, norm: float) -> str:
        first = self.step - (0 if self.device.type == "cpu" else self._steps_in_sums - 1)
        when = f"step {self.step}" if first == self.step else f"steps {first} to {self.step}"
        good = checkpoint.latest(self.run_dir)
        remedies = ["a lower --lr", "--clip-grad-norm 1", "--warmup-steps 1000"]
        if self.amp != "off":
            remedies.append("--amp off")
        return (
            f"loss {loss}, gradient norm {norm} at {when}. No checkpoint was written of it; "
            f"the last good one is {good or 'none'}. Likely remedies: {', '.join(remedies)}"
        )

    def _describe_step(self, steps_per_s: float) -> dict[str, Any]:
        stage = self.curriculum.at(self.step - 1)
        tokens = self.processes.world_size * self.config.batch_size * 2 * stage.n_points
        return {
            "lr": self.learning_rate(self.step - 1),
            **stage._asdict(),
            "steps_per_s": steps_per_s,
            "tokens_per_s": steps_per_s * tokens,
        }

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signal = signum
        # A second one ends the process at once. Several processes may each get one, and again from
        # torchrun, which ends them itself if they take long.
        if self.processes.world_size == 1:
            signal.signal(signum, signal.SIG_DFL)


def step_flops(config: TrainConfig, stage: Stage) -> float:
    """Floating-point operations in the blocks of a training step at that stage."""
    D, S = config.n_embd, 2 * stage.n_points
    passes = stage.n_loops + 2 * min(config.window, stage.n_loops)  # backward counts twice
    return config.batch_size * passes * config.n_layer * S * (24 * D * D + 2 * S * D)
