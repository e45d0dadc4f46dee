"""One training step: batch, loss, gradients, update; replayed as a CUDA graph on a GPU."""

from __future__ import annotations

import functools
import logging
import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.config import ModelConfig
from looped_fast.model import LoopedTransformer
from looped_fast.ops import backends, graphs
from looped_fast.ops.call import Call
from looped_fast.ops.reference import AUTOCAST_DTYPES
from looped_fast.tasks import Batch, FixedPrompts, batch_seed, draw_batch
from looped_fast.training import checkpoint, distributed
from looped_fast.training.checkpoint_check import check_moments, check_weights
from looped_fast.training.config import TrainConfig
from looped_fast.training.curriculum import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Weights that a new run starts from, instead of random ones; see ``pretrained.load_start``.

    Attributes:
        path: file or folder that it was read from.
        model_state: name -> tensor, under the official state-dict names.
        optimizer_state: state dict of ``torch.optim.Adam``; None for a fresh optimizer.
        step: training steps finished; 0 if the run starts its own count.
    """

    path: Path
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None = None
    step: int = 0


class Objective(nn.Module):
    """``model.loss`` as a module's forward, the only method that DistributedDataParallel wraps."""

    def __init__(self, model: LoopedTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        """Run ``LoopedTransformer.loss`` (same arguments and result)."""
        return self.model.loss(*args)


class Stepper:
    """Model, optimizer and data of ``config``, and its training steps, without logs and files.

    The data of step i is a pure function of (seed, i, rank). Each of several processes makes a
    stepper and calls the same methods; a step then averages gradients over the processes' batches.

    On a GPU the first step of a curriculum stage (n_points, n_loops) runs as usual, the second
    is captured as a CUDA graph, and later ones replay it. All else that changes from step to step
    (n_dims, learning rate, random numbers) is therefore kept on the device.

    Args:
        config: all settings.
        resume: a checkpoint of this run to continue from.
        processes: processes that train the model, from ``distributed.join``; only this by default.
        start: weights that a new run starts from, instead of random ones.

    Raises:
        CheckpointError: ``resume`` is damaged, or it or ``start`` is of another model.
        ValueError: a device or backend can't be used, CUDA graphs are required of several
            processes, torchrun started several and ``processes`` is not given, or
            ``config.init_from`` is set and neither ``start`` nor ``resume`` is given.
    """

    def __init__(
        self,
        config: TrainConfig,
        resume: checkpoint.Checkpoint | None = None,
        processes: distributed.Processes | None = None,
        start: Start | None = None,
    ) -> None:
        self.processes = distributed.single_process() if processes is None else processes
        self.config = config
        self.device = self.processes.own_device(distributed.resolve_device(config.device))
        self.task = config.make_task()
        self.curriculum = config.make_curriculum()
        torch.manual_seed(config.seed)
        model = LoopedTransformer(
            self._model_config(),
            config.backend,
            recompute=config.recompute,
            attention=config.attention,
            cuda_graphs="off",  # in inference: evaluations are too rare for graphs
        )
        self.model = model.to(self.device)
        self._objective = Objective(self.model)
        on_cpu = self.device.type == "cpu"  # where fused Adam reads a float64 rate
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
        self.precision = self._available_precision()
        self.scaler = self._make_scaler()
        self.step = 0  # completed steps
        if resume is not None:
            checkpoint.restore_into(resume, self.model, self.optimizer, self.scaler, self._unused())
            self.step = resume.step
        elif start is not None:
            self._start_from(start)
        elif config.init_from is not None:
            raise ValueError(
                f"init_from = {config.init_from!r} is not read by a Trainer; pass "
                f"start=looped_fast.pretrained.load_start(config.init_from)"
            )
        for group in self.optimizer.param_groups:
            group.update(settings)  # replaces those of a checkpoint
        self._fixed_prompts = (
            FixedPrompts(
                self.task, config.train_prompts, config.n_points, config.batch_size,
                seed=config.seed, device=self.device, world_size=self.processes.world_size,
            )
            if config.train_prompts is not None
            else None
        )  # fmt: skip
        self._sums = torch.zeros(3, device=self.device)  # sums of loss, mean y^2, gradient norm
        self._steps_in_sums = 0
        # With the learning rate, these are all that differs from step to step within a stage.
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

    def _available_precision(self) -> str:
        config = self.config

        def describe(precision: str) -> Call:
            return self.model.describe_call(config.batch_size, config.n_points, precision)

        return available_precision(config, self.device, describe, warns=self.processes.is_main)

    def _unused(self) -> tuple[str, ...]:
        """Parameters that may get no gradient: the prompt may enter outside of the window."""
        config = self.config
        outside = config.injection == "none" and config.window < config.n_loops
        return ("_read_in.weight", "_read_in.bias") if outside else ()

    def _start_from(self, start: Start) -> None:
        hint = "Give this run the sizes of the one that made it (--n-embd, --n-layer, ...)"
        check_weights(start.path, start.model_state, self.model, hint)
        if start.optimizer_state is not None:
            check_moments(start.path, start.optimizer_state["state"], self.model, self._unused())
        self.model.load_state_dict(start.model_state)
        if start.optimizer_state is not None:
            # Keep Adam's moments, but with this run's settings.
            groups = self.optimizer.state_dict()["param_groups"]
            state = start.optimizer_state["state"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = start.step

    def autocast(self) -> AbstractContextManager:
        """Autocast to ``self.precision``."""
        dtype = AUTOCAST_DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def training_step(self) -> None:
        """Take one optimizer step on the next batch."""
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
        """Write inputs of the next step to the tensors that ``_update`` and its graph read."""
        self._lr.fill_(self.learning_rate(self.step))
        self._n_dims.fill_(self.curriculum.at(self.step).n_dims)
        rank = self.processes.rank
        if self._fixed_prompts is None:
            self._generator.manual_seed(batch_seed(self.config.seed, self.step, rank))
        else:
            rows = self._fixed_prompts.rows(self.step, rank)
            if self.device.type == "cuda":  # else the copy would wait for the last step
                rows = rows.pin_memory()
            self._rows.copy_(rows, non_blocking=True)

    def _update(self, n_points: int, n_loops: int) -> None:
        """Run the device's part of a step: reads no values, nor shapes from them, on the host."""
        config = self.config
        loss, zero = self._loss(n_points, n_loops, self._averaging_objective)
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
    def _averaging_objective(self) -> nn.Module:
        """The objective, wrapped at its first use to average gradients over processes."""
        _, n_points, n_loops = self.curriculum.at(0)
        averaging = self.processes.average_gradients(
            self._objective, some_unused=bool(self._unused())
        )
        if averaging is not self._objective:
            # DDP sorts its buckets by the first backward, and buckets fix the order in which three
            # or more processes are summed. A trial on the shapes of step 0 therefore gives a
            # resumed run the same bits as an uninterrupted one.
            self._loss(n_points, n_loops, averaging)[0].backward()
            self.model.zero_grad(set_to_none=True)
            self._set_inputs()  # the trial advanced the generator
        return averaging

    def _drop_half_step(self) -> None:
        """Undo half a step after a failed capture: gradients, scaler and generator."""
        self.optimizer.zero_grad(set_to_none=True)
        scaler = self._make_scaler()
        if self.scaler.is_enabled():
            scaler.load_state_dict(self.scaler.state_dict())
        self.scaler = scaler
        self._generator = torch.Generator(self.device)  # the old one may still be capturing
        self._set_inputs()

    def _make_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")

    def learning_rate(self, step: int) -> float:
        """Learning rate of step ``step``, from 0."""
        return learning_rate(self.config, step)

    def _loss(
        self, n_points: int, n_loops: int, objective: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss on the batch that ``_set_inputs`` chose, and the loss of predicting zero."""
        xs, ys = self._batch(n_points)
        window = min(self.config.window, n_loops)
        n_supervised = min(self.config.supervised_window, window)
        with self.autocast():
            value = (objective or self._objective)(xs, ys, n_loops, window, n_supervised)
        return value, ys.square().mean()

    def _batch(self, n_points: int) -> Batch:
        if self._fixed_prompts is not None:
            return self._fixed_prompts.take(self._rows, n_points, self._n_dims)
        return draw_batch(
            self.task, self.config.batch_size, n_points, self._generator, self._n_dims
        )


def available_precision(
    config: Any, device: torch.device, describe: Callable[[str], Call], *, warns: bool = True
) -> str:
    """The configured precision, or fp32, which is logged, if bf16 is slower on this CPU.

    Args:
        config: settings precision and backend.
        device: where the run trains.
        describe: gives the call of a training step at a precision.
        warns: False in processes that leave the log to another.
    """
    wanted: str = config.precision
    if device.type != "cpu" or wanted != "bf16":
        return wanted
    bf16, fp32 = (backends.select(describe(precision)) for precision in ("bf16", "fp32"))
    if bf16.chosen != "cpu" and fp32.chosen == "cpu":
        reason = bf16.reasons["cpu"]
    elif bf16.chosen == "reference" and config.backend == "auto" and _emulates_bf16():
        reason = "without the engine, a CPU that has no AVX512_BF16 is slower in bf16"
    else:
        return wanted
    if warns:
        logger.warning("amp bf16 runs in fp32 here: %s", reason)
    return "fp32"


def _emulates_bf16() -> bool:
    """True on an x86 CPU whose bf16 products are made of fp32 ones."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not torch.cpu._is_avx512_bf16_supported()
