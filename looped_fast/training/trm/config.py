"""``TRMTrainConfig``: everything that defines a training run of a Tiny Recursive Model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from looped_fast.config import BACKENDS
from looped_fast.errors import CheckpointError, check_name, naming
from looped_fast.model import TRMConfig
from looped_fast.tasks.puzzles import PuzzleTask, find_puzzles
from looped_fast.training import checkpoint
from looped_fast.training.config import changed_fields, check_numbers
from looped_fast.training.yaml_file import read_yaml

PRESETS = ("public", "tiny")

# Names of the public code and of our other models -> ours, for hints.
KNOWN_AS = {
    "n_embd": "hidden_size", "n_head": "num_heads", "n_layer": "L_layers", "n_loops": "L_cycles",
    "global_batch_size": "batch_size", "lr_warmup_steps": "warmup_steps", "ema": "ema_rate",
    "epochs": "steps", "learning_rate": "lr", "forward_dtype": "amp", "precision": "amp",
    "eval_interval": "eval_every", "eval_prompts": "eval_puzzles", "data_paths": "task",
    "checkpoint_path": "out",
}  # fmt: skip
_FILE = Path(__file__).parents[1] / "presets" / "trm.yaml"


@dataclass(frozen=True)
class TRMTrainConfig:
    """Settings of a training run; defaults are the public code's."""

    task: str = "sudoku4"
    """Puzzles: sudoku4, sudoku6; or a folder of the public code's data sets."""
    model: Literal["trm"] = "trm"
    """trm: a Tiny Recursive Model; --help without it lists the settings of other models."""
    preset: str = "public"
    """Where the other settings came from: tiny or public."""

    hidden_size: int = 512
    """Residual width D."""
    num_heads: int = 8
    """Attention heads."""
    L_layers: int = 2
    """Blocks of the network, which updates both states."""
    H_cycles: int = 3
    """Cycles in a supervision step; the last one carries gradient."""
    L_cycles: int = 6
    """Updates of z_L in a cycle, after which z_H is updated once."""
    expansion: float = 4.0
    """Hidden width of the MLP over D, before the factor 2/3 of a gated one."""
    pos_encodings: Literal["rope", "learned", "none"] = "rope"
    """Positions: rotary, learned or none."""
    puzzle_emb_ndim: int = 0
    """Width of an embedding that the puzzles share; 0: none."""
    puzzle_emb_len: int = 0
    """Tokens before a puzzle that hold it; 0: as many as it needs."""
    halt_max_steps: int = 16
    """Most supervision steps for a puzzle."""
    halt_exploration_prob: float = 0.1
    """How often a puzzle may not halt before a random number of supervision steps."""

    steps: int = 65_104
    """Training steps, each one supervision step of every puzzle in the batch."""
    batch_size: int = 768
    """Puzzles in a step."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    beta2: float = 0.95
    """AdamW's decay rate of squared gradients."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises from 0."""
    lr_decay: Literal["none", "cosine"] = "none"
    """cosine: the learning rate falls to 0 at the last step."""
    ema_rate: float = 0.999
    """Rate of the moving average of weights, which is evaluated and shared; 0: no average."""
    seed: int = 0
    """Seed of initial weights, puzzles and exploration."""

    amp: Literal["off", "bf16"] = "off"
    """Operands of matrix products; everything else is float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""
    backend: str = "auto"
    """Implementation of the loop: auto, reference, compiled, cpu, triton."""

    out: str | None = None
    """Folder of the run; none: runs/<task>-trm-<preset>-<time>."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 5000
    """Steps between evaluations."""
    eval_puzzles: int = 256
    """Puzzles of an evaluation during training; the last evaluation uses five times as many."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    wandb: str | None = None
    """Weights & Biases project to log to."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            at_least_one="steps batch_size log_every eval_every eval_puzzles save_every keep",
            at_least_zero="lr weight_decay warmup_steps seed",
            below_one="beta2 ema_rate",
        )
        check_name("backend", self.backend, ["auto", *BACKENDS])
        self._sizes(vocab_size=1, seq_len=1)  # raises ValueError for its part of the settings

    def make_task(self) -> PuzzleTask:
        """Find the puzzles. Raises as ``find_puzzles``."""
        return find_puzzles(self.task)

    def model_config(self, task: PuzzleTask) -> TRMConfig:
        """The model's part of the settings, for puzzles of ``task``."""
        return self._sizes(vocab_size=task.vocab_size, seq_len=task.seq_len)

    def _sizes(self, **of_task: Any) -> TRMConfig:
        shared = {f.name for f in dataclasses.fields(TRMConfig)} & self.to_dict().keys()
        return TRMConfig(**of_task, **{name: getattr(self, name) for name in shared})

    @property
    def precision(self) -> str:
        """Operands of matrix products: ``amp``, with ``off`` as the library's ``fp32``."""
        return "fp32" if self.amp == "off" else self.amp

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dict, for YAML and JSON."""
        return dataclasses.asdict(self)


def trm_preset(preset: str = "tiny", task: str = "sudoku4") -> TRMTrainConfig:
    """The settings of a preset for a task.

    >>> trm_preset("public").batch_size
    768

    Raises:
        ValueError: an unknown preset; the message has the nearest.
    """
    check_name("preset of trm", preset, PRESETS)
    size = read_yaml(_FILE)[preset]
    with naming(_FILE):
        settings = {**size["all"], **size.get(task, {}), "task": task, "preset": preset}
        return trm_config(settings, TRMTrainConfig())


def trm_config(settings: Mapping[str, Any], base: TRMTrainConfig) -> TRMTrainConfig:
    """Replace the given settings of ``base``.

    Raises:
        ValueError: a setting is unknown (the message has the nearest) or of a wrong type.
    """
    return dataclasses.replace(base, **changed_fields(base, dict(settings), known_as=KNOWN_AS))


def is_trm(config: Mapping[str, Any]) -> bool:
    """True for the settings of a Tiny Recursive Model's run, as its checkpoints hold them."""
    return config.get("model") == "trm"


def saved_trm_config(saved: checkpoint.Checkpoint) -> TRMTrainConfig:
    """The settings of the run that wrote ``saved``.

    Raises:
        CheckpointError: its settings are unknown or out of range; the message names the file.
    """
    try:
        return trm_config(saved.config, TRMTrainConfig())
    except ValueError as error:
        raise CheckpointError(
            f"{saved.path / checkpoint.INDEX} holds settings that can't be used: {error}. It is "
            f"corrupt, or of another version of looped_fast"
        ) from error
