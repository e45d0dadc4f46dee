"""``TrainConfig``: one record of everything that defines a training run.

The command line sets it, a run's ``config.yaml`` and its checkpoints hold it, and ``presets/`` has
ready ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from looped_fast.config import BACKENDS, ModelConfig
from looped_fast.errors import CheckpointError, check_name, unknown_name
from looped_fast.tasks import Task, TaskNotImportedError, find_task, make_task, task_name
from looped_fast.tasks.options import TaskOptions, coerce
from looped_fast.training import checkpoint
from looped_fast.training.curriculum import Curriculum, Schedule
from looped_fast.training.task_settings import (
    OPTIONS_OF_BEFORE,
    merge_task,
    moved_option,
    plain,
    task_settings,
    with_options_of_before,
)

MODELS = ("looped", "standard", "tied")

# Names of the official code and of other libraries -> ours, for hints.
KNOWN_AS = {
    "task_name": "task", "family": "model", "loop_func": "injection",
    "n_loop_window": "window", "num_loops": "n_loops", "add_inputs_embeds": "injection",
    "d_model": "n_embd", "hidden_size": "n_embd", "num_heads": "n_head", "num_layers": "n_layer",
    "train_size": "train_prompts", "dataset_size": "train_prompts",
    "train_steps": "steps", "max_steps": "steps", "epochs": "steps", "iterations": "steps",
    "learning_rate": "lr", "lr_scheduler": "lr_decay", "warmup": "warmup_steps",
    "grad_clip": "clip_grad_norm", "max_grad_norm": "clip_grad_norm", "adam_beta2": "beta2",
    "pretrained_path": "init_from", "checkpoint": "init_from", "use_ctx": "amp",
    "precision": "amp", "dtype": "amp", "gradient_checkpointing": "recompute",
    "out_dir": "out", "output_dir": "out", "save_every_steps": "save_every",
    "log_every_steps": "log_every", "keep_every_steps": "keep",
}  # fmt: skip


@dataclass(frozen=True)
class ScheduleConfig:
    """A curriculum schedule: ``start``, plus ``inc`` every ``interval`` steps, up to ``end``."""

    start: int | None = None  # first value; none: the final value from the first step
    inc: int = 1  # added after every interval
    interval: int = 1  # in training steps
    end: int | None = None  # last value; none: n_dims, n_points or n_loops

    def schedule(self, final: int) -> Schedule:
        """The ``Schedule`` that ends at ``end``, or at ``final`` if ``end`` is not set."""
        end = final if self.end is None else self.end
        start = end if self.start is None else min(self.start, end)
        return Schedule(start, end, self.inc, self.interval)


@dataclass(frozen=True)
class CurriculumConfig:
    """The curriculum of a run (official ``training.curriculum``)."""

    dims: ScheduleConfig = field(default_factory=ScheduleConfig)  # active coordinates of x
    points: ScheduleConfig = field(default_factory=ScheduleConfig)  # in-context points
    loops: ScheduleConfig = field(default_factory=ScheduleConfig)  # loop steps


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; defaults are the paper's where it gives any."""

    task: str = "lr"
    """Function class: lr, noisy_lr, sparse_lr, dt, relu_2nn, quadratic, classification, fourier,
    mixture; or one of yours, as mypackage.module:MyTask (in Python also the class)."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task, --task.NAME on the command line; defaults where not given."""
    model: Literal["looped", "standard", "tied"] = "looped"
    """looped: a block run n_loops times on the injected prompt; standard: n_layer blocks;
    tied: a block run n_loops times, without injection. (--model trm is for puzzles, and has
    settings of its own: --model trm --help.)"""
    preset: str = "paper"
    """Where the other settings came from: tiny, small, paper, or a file."""

    n_dims: int = 20
    """Width d of x."""
    n_points: int = 41
    """In-context points n of a prompt, at the end of the curriculum."""
    n_positions: int = 101
    """Most points that the model can take."""
    n_embd: int = 256
    """Residual width D."""
    n_head: int = 8
    """Attention heads."""
    n_layer: int = 1
    """Blocks in one loop step."""
    injection: Literal["add", "mul", "none", "every_block"] = "add"
    """How the prompt enters a loop step; see ModelConfig."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    n_loops: int = 30
    """Loop steps b, at the end of the curriculum."""
    window: int = None  # type: ignore[assignment]  # an int once the record is made
    """Last steps T that carry gradient and loss; lowered to n_loops if it is not given."""

    train_prompts: int | None = None
    """Train on a fixed set of this many prompts; none: fresh prompts every step."""

    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Schedules of dims, points and loops."""
    steps: int = 500_000
    """Training steps."""
    batch_size: int = 64
    """Prompts in a step; each process has as many if torchrun starts several."""
    lr: float = 1e-4
    """Adam's learning rate."""
    beta2: float = 0.999
    """Adam's decay rate of squared gradients."""
    weight_decay: float = 0.0
    """Adam's weight decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    lr_decay: Literal["none", "cosine"] = "none"
    """cosine: the learning rate falls to 0 at the last step."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradient; none: no clipping."""
    seed: int = 42
    """Seed of initial weights and data."""
    init_from: str | None = None
    """Start from this checkpoint: a folder of ours (weights only), or an official state.pt or
    model_N.pt (which also continues at its step)."""

    amp: Literal["off", "bf16", "fp16"] = "off"
    """Operands of matrix products; everything else is float32. fp16 scales the loss."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""
    backend: str = "auto"
    """Implementation of the loop: auto, reference, compiled, cpu, triton."""
    attention: Literal["auto", "triton", "flash_attn", "sdpa"] = "auto"
    """Implementation of attention on the triton backend: this project, flash-attn, PyTorch."""

    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay a training step as one CUDA graph, captured once for each stage of the curriculum.
    auto: on a GPU, if it can be captured; on: an error if it can't."""
    recompute: bool = False
    """Recompute activations in the backward: less memory, more time. It has no effect on the cpu
    backend, which keeps activations of one prompt per thread."""

    out: str | None = None
    """Folder of the run; none: runs/<task>-<model>-<preset>-<time>."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 5000
    """Steps between evaluations."""
    eval_prompts: int = 256
    """Prompts of an evaluation during training; the last evaluation uses five times as many."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    wandb: str | None = None
    """Weights & Biases project to log to."""

    def __post_init__(self) -> None:
        if self.window is None:  # nobody gave it, so it fits
            window = self.n_loops if self.model == "tied" else min(15, self.n_loops)
            object.__setattr__(self, "window", window)
        self._complete_task()
        check_numbers(
            self,
            at_least_one="steps batch_size log_every eval_every eval_prompts save_every keep",
            at_least_zero="lr weight_decay warmup_steps seed",
            below_one="beta2",
        )
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm = {self.clip_grad_norm}: more than 0, or None")
        check_name("backend", self.backend, ["auto", *BACKENDS])
        if self.n_points > self.n_positions:
            raise ValueError(
                f"n_points = {self.n_points} exceeds n_positions = {self.n_positions}; "
                f"lower n_points or raise n_positions"
            )
        self._check_model()
        # Each of these raises ValueError for its part of the settings.
        self.model_config()
        self.make_curriculum()

    def _check_model(self) -> None:
        loops, window, injection = self.n_loops, self.window, self.injection
        if self.model == "standard" and (loops, window) != (1, 1):
            raise ValueError(
                f"a standard model makes one pass, but n_loops = {loops}, window = {window}; "
                f"set both to 1 and choose n_layer, or use --model looped"
            )
        if self.model == "tied" and window != loops:
            raise ValueError(
                f"a tied model is trained through all its steps, but window = {window} and "
                f"n_loops = {loops}; set both to the same"
            )
        valid = {
            "looped": ("add", "mul", "none"),
            "standard": ("none", "every_block"),
            "tied": ("none",),
        }
        check_name("model", self.model, MODELS)
        if injection not in valid[self.model]:
            raise ValueError(
                f"injection = {injection!r} does not go with model = {self.model!r}; "
                f"valid: {', '.join(valid[self.model])}"
            )

    def _complete_task(self) -> None:
        """Put the task's name in place of its class, and values of all its options.

        Options that come from settings of another task are dropped: ``dataclasses.replace`` may
        change the task alone.
        """
        task: Any = self.task
        name = task_name(task if isinstance(task, type) else find_task(task))
        options = TaskOptions.fitting(self.task_options, name)
        made = make_task(name, self.n_dims, **options)
        object.__setattr__(self, "task", name)
        object.__setattr__(self, "task_options", TaskOptions.of(name, made))

    def make_task(self) -> Task:
        """Make the task."""
        return make_task(self.task, self.n_dims, **self.task_options)

    def model_config(self) -> ModelConfig:
        """The model's part of the settings."""
        names = [f.name for f in dataclasses.fields(ModelConfig) if f.name != "pred_type"]
        return ModelConfig(**{name: getattr(self, name) for name in names})

    def make_curriculum(self) -> Curriculum:
        """Make the three schedules; each ends at its final value unless its ``end`` is set."""
        finals = {"dims": self.n_dims, "points": self.n_points, "loops": self.n_loops}
        schedules = {}
        for name, final in finals.items():
            if final < 1:
                raise ValueError(f"n_{name} = {final}: at least 1 is needed")
            try:
                schedules[name] = getattr(self.curriculum, name).schedule(final)
            except ValueError as error:
                raise ValueError(f"curriculum.{name}: {error}") from None
            if schedules[name].end > final:
                raise ValueError(
                    f"curriculum.{name}.end = {schedules[name].end} exceeds its final value "
                    f"{final} (n_{name})"
                )
        return Curriculum(**schedules)

    @property
    def precision(self) -> str:
        """Operands of matrix products: ``amp``, with ``off`` as the library's ``fp32``."""
        return "fp32" if self.amp == "off" else self.amp

    @property
    def supervised_window(self) -> int:
        """Number of last steps in the loss: the window of a looped model, 1 of the others."""
        return self.window if self.model == "looped" else 1

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain nested dict, for YAML and JSON.

        ``task`` is a dict of the task's name and its options: ``{"name": "dt", "depth": 4}``.
        """
        settings = dataclasses.asdict(self)
        options = settings.pop("task_options")
        return settings | {"task": {"name": self.task, **plain(options)}}


def check_numbers(config: Any, at_least_one: str, at_least_zero: str, below_one: str) -> None:
    """Raise ValueError for a number of a run's settings that is out of range.

    The other arguments are names of settings in a row; those below one are at least zero, too.
    """
    numbers = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in (numbers | numbers.get("task_options", {})).items():
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"{name} has {value.bit_length()} bits; at most 63 are possible")
    for name in at_least_one.split():
        if numbers[name] < 1:
            raise ValueError(f"{name} = {numbers[name]}: at least 1 is needed")
    for name in at_least_zero.split():
        if not numbers[name] >= 0:
            raise ValueError(f"{name} = {numbers[name]}: at least 0 is needed")
    for name in below_one.split():
        if not 0 <= numbers[name] < 1:
            raise ValueError(f"{name} = {numbers[name]}: at least 0 and less than 1 is needed")


def config_from_dict(settings: dict[str, Any], base: TrainConfig) -> TrainConfig:
    """Replace the given settings of ``base``; a nested dict replaces only what it names.

    ``task`` is a name, or a dict of a name and options. Another task starts from its defaults.
    If ``n_loops`` is given without a ``window``, that of ``base`` is lowered to fit.

    Raises:
        ValueError: a setting is unknown (the message has the nearest) or of a wrong type.
    """
    if moved := [name for name in OPTIONS_OF_BEFORE if name in settings]:
        raise moved_option(moved[0], f"setting {moved[0]}")
    if "n_loops" in settings and "window" not in settings:
        n_loops = coerce("n_loops", settings["n_loops"], int)
        tied = settings.get("model", base.model) == "tied"
        settings = {**settings, "window": n_loops if tied else min(base.window, n_loops)}
    if "task" not in settings:
        return _replace(base, settings, prefix="")
    before = {"name": base.task, **base.task_options}
    options = merge_task(before, task_settings(settings["task"]))
    task = options.pop("name", base.task)
    others = {name: value for name, value in settings.items() if name != "task"}
    changes = changed_fields(base, others)
    return dataclasses.replace(base, task=task, task_options=options, **changes)


def saved_config(saved: checkpoint.Checkpoint, base: TrainConfig | None = None) -> TrainConfig:
    """The settings of the run that wrote ``saved``.

    Args:
        saved: a checkpoint of a run, or exported weights.
        base: settings that a checkpoint of an older version lacks; the defaults if not given.

    Raises:
        CheckpointError: its settings are unknown or out of range; the message names the file.
        ValueError: the module of its task is not imported, see ``tasks.find_task``.
    """
    with _naming_index(saved):
        settings = with_options_of_before(saved.config)
        return config_from_dict(settings, TrainConfig() if base is None else base)


def saved_model_config(saved: checkpoint.Checkpoint) -> ModelConfig:
    """The model's part of ``saved_config``, which needs no task: its module may not be imported.

    Raises:
        CheckpointError: as in ``saved_config``, for settings other than those of the task.
    """
    settings = {k: v for k, v in saved.config.items() if k not in ("task", *OPTIONS_OF_BEFORE)}
    with _naming_index(saved):
        return config_from_dict(settings, TrainConfig()).model_config()


@contextlib.contextmanager
def _naming_index(saved: checkpoint.Checkpoint) -> Iterator[None]:
    """Raise a ValueError about settings as a CheckpointError that names their file."""
    index = saved.path / checkpoint.INDEX
    try:
        yield
    except TaskNotImportedError as error:  # the file is sound
        raise ValueError(f"{index}: {error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{index} holds settings that can't be used: {error}. It is corrupt, or of another "
            f"version of looped_fast or of its task"
        ) from error


def _replace(record: Any, settings: dict[str, Any], prefix: str) -> Any:
    return dataclasses.replace(record, **changed_fields(record, settings, prefix))


def changed_fields(
    record: Any,
    settings: dict[str, Any],
    prefix: str = "",
    known_as: Mapping[str, str] = KNOWN_AS,
) -> dict[str, Any]:
    """Arguments with which ``dataclasses.replace`` puts ``settings`` of a file into ``record``.

    prefix: starts the names of settings in messages.
    known_as: names that others use -> ours, for hints.

    Raises:
        ValueError: a setting is unknown (the message has the nearest) or of a wrong type.
    """
    hints = typing.get_type_hints(type(record))
    hints.pop("task_options", None)  # in files these are part of task
    changes = {}
    for name, value in settings.items():
        if name not in hints:
            valid = [prefix + n for n in hints]
            raise unknown_name("setting", f"{prefix}{name}", valid, {} if prefix else known_as)
        current = getattr(record, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"setting {prefix}{name} = {value!r}: a mapping is needed")
            changes[name] = _replace(current, value, f"{prefix}{name}.")
        else:
            changes[name] = coerce(prefix + name, value, hints[name])
    return changes
