"""Shorten and resume the training runs of an experiment."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from looped_fast.training import checkpoint
from looped_fast.training.config import (
    CurriculumConfig,
    ScheduleConfig,
    TrainConfig,
    saved_config,
)
from looped_fast.training.run_folder import CONFIG_FILE, changed_settings


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """The same training in ``steps`` steps: warm-up and curriculum shrink in proportion."""
    scale = steps / config.steps

    def shrink(growth: ScheduleConfig) -> ScheduleConfig:
        return dataclasses.replace(growth, interval=max(1, round(growth.interval * scale)))

    schedules = {
        f.name: shrink(getattr(config.curriculum, f.name))
        for f in dataclasses.fields(CurriculumConfig)
    }
    return dataclasses.replace(
        config,
        steps=steps,
        warmup_steps=round(config.warmup_steps * scale),
        curriculum=CurriculumConfig(**schedules),
    )


def last_checkpoint(config: TrainConfig, run_dir: Path) -> checkpoint.Checkpoint | None:
    """Latest checkpoint to resume from, or None; then ``config.yaml`` is written.

    Raises:
        ValueError: the folder holds a run with other settings.
        CheckpointError: the checkpoint is damaged.
    """
    latest = checkpoint.latest(run_dir)
    if latest is None:
        settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
        (run_dir / CONFIG_FILE).write_text(settings, encoding="utf-8")
        return None
    saved = checkpoint.load(latest)
    before = saved_config(saved, type(config)())  # defaults for newer settings
    changes = changed_settings(before.to_dict(), config.to_dict())
    if changes:
        raise ValueError(
            f"{run_dir} holds a run with other settings ({', '.join(changes)}); "
            f"choose another --out, or delete it"
        )
    return saved
