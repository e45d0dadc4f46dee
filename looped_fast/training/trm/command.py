"""``python -m looped_fast.train --model trm``: flags, the run, and its report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from looped_fast.config import VERSION
from looped_fast.dropin.explain import explain_backend
from looped_fast.errors import read_json
from looped_fast.evaluation.puzzle_figures import save_report
from looped_fast.evaluation.puzzles import accuracy_table
from looped_fast.evaluation.report import can_write
from looped_fast.training import checkpoint, distributed, lock, run_folder
from looped_fast.training.command_line import parse as parse_flags
from looped_fast.training.command_line import program
from looped_fast.training.fit import Interrupted
from looped_fast.training.log import METRICS_FILE, read_metrics
from looped_fast.training.trm.config import (
    KNOWN_AS,
    TRMTrainConfig,
    is_trm,
    saved_trm_config,
    trm_config,
    trm_preset,
)
from looped_fast.training.trm.trainer import TRMTrainer
from looped_fast.training.yaml_file import read_yaml, without_none


@dataclass(frozen=True)
class Command:
    """Train a Tiny Recursive Model on puzzles.

    The defaults below are those of the preset; choose one with --preset and --task.
    """

    settings: Annotated[TRMTrainConfig, tyro.conf.arg(name="")]  # flags without a prefix
    config: Path | None = None
    """YAML file of settings."""
    resume: Path | None = None
    """Folder of a run to continue from its latest checkpoint."""


def trains_trm(chosen: argparse.Namespace) -> bool:
    """True if the command line is for a Tiny Recursive Model, by run, flag or file.

    chosen: model, config (a path or None) and resume (likewise).
    """
    with contextlib.suppress(OSError, ValueError):  # the command itself reports it
        if chosen.resume is not None and (latest := checkpoint.latest(chosen.resume)) is not None:
            return is_trm(read_json(latest / checkpoint.INDEX)["config"])
        if chosen.model is None and chosen.config is not None:
            settings = read_yaml(chosen.config)
            return isinstance(settings, dict) and is_trm(settings)
    return bool(chosen.model == "trm")


def main(args: list[str], chosen: argparse.Namespace, processes: distributed.Processes) -> int:
    """Train; return the exit status.

    Args:
        args: the command line.
        chosen: its task, preset, config and resume, on which the defaults of other flags depend.
        processes: this process.
    """
    if processes.world_size > 1:
        raise ValueError(
            f"{processes.world_size} processes: a model trm is trained by a single one; start "
            f"without torchrun"
        )
    with contextlib.ExitStack() as held:
        command, origin, saved = parse(args, chosen, held)
        config, run_dir = command.settings, command.resume
        if run_dir is None:
            label = f"{Path(config.task).name}-trm-{Path(config.preset).stem}"
            run_dir = run_folder.make_run_dir(label, config.out, held)
        print(f"looped_fast {VERSION}, task {config.task}, {origin}")
        trainer = TRMTrainer(config, run_dir, saved)
        announce(trainer)
        run_folder.write_config(config.to_dict(), run_dir)
        started = time.perf_counter()
        try:
            trainer.fit()
        except Interrupted as stop:
            print(
                f"\n{stop}: step {trainer.step} is finished and saved. Continue with\n"
                f"  python -m looped_fast.train --resume {run_dir}",
                flush=True,
            )
            return 128 + stop.signum
        minutes = (time.perf_counter() - started) / 60
        report(trainer, f"{trainer.step} steps, {minutes:.1f} minutes in this sitting")
    return 0


def parse(
    args: list[str], chosen: argparse.Namespace, held: contextlib.ExitStack
) -> tuple[Command, str, checkpoint.Checkpoint | None]:
    """Parse settings, a phrase that says where they come from, and the checkpoint to resume.

    ``held`` gets the lock of the run to resume, before its latest checkpoint is looked up.
    """
    saved = None
    given = {name: getattr(chosen, name) for name in ("task", "preset") if getattr(chosen, name)}
    if chosen.resume is not None:
        if chosen.resume.is_dir():
            held.enter_context(lock.hold(chosen.resume))
        saved = run_folder.load_latest(chosen.resume)
        base = saved_trm_config(saved)
        origin = f"continuing {chosen.resume} from step {saved.step}"
    elif chosen.config is not None:
        settings = {**read_yaml(chosen.config), **given}
        preset = settings.get("preset", "tiny")
        base = trm_config(settings, trm_preset(preset, settings.get("task", "sudoku4")))
        base = dataclasses.replace(base, preset=given.get("preset", str(chosen.config)))
        origin = f"settings of {chosen.config}"
    else:
        base = trm_preset(**given)
        origin = f"preset {base.preset}" + ("" if "preset" in given else " (the default)")
    default = Command(base)
    command = parse_flags(Command, args, program("train"), default, KNOWN_AS)
    if saved is not None:
        changes = run_folder.changed_settings(base.to_dict(), command.settings.to_dict())
        origin += f"; changed: {', '.join(changes)}" if changes else ""
        run_folder.check_resume(chosen.resume, saved, base, command.settings, command.config)
    return command, origin, saved


def announce(trainer: TRMTrainer) -> None:
    """Print the settings, backend and estimated time of the run."""
    config, device = trainer.config, trainer.device
    print("\n" + without_none(config.to_dict()))
    explanation = explain_backend(trainer.model, config.batch_size, precision=trainer.precision)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters on {hardware}{threads}; {explanation}")
    minutes = trainer.estimate_seconds() / 60
    time_left = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    print(f"estimated time: {time_left}. Shorter: --steps N")
    print(f"writing to {trainer.run_dir}\n")
    can_write("plots", "TensorBoard events")  # says now what will be left out


def report(trainer: TRMTrainer, summary: str) -> None:
    """Evaluate on unseen puzzles; print a table, write ``results.json`` and a picture."""
    config, run_dir = trainer.config, trainer.run_dir
    puzzles = trainer.task.evaluation_batch(5 * config.eval_puzzles, config.seed)
    accuracy = trainer.evaluate(puzzles)
    name = Path(config.task).name
    title = f"{name}, trm, {Path(config.preset).stem}: {summary}"
    print(f"\n{title}; {len(puzzles.inputs)} unseen puzzles\n")
    print(accuracy_table({run_dir.name: accuracy}))
    results: dict[str, Any] = {
        "summary": summary,
        "puzzles": len(puzzles.inputs),
        "seed": config.seed,
        "torch": torch.__version__,
        "looped_fast": VERSION,
        "accuracy": accuracy.to_dict(),
    }
    (run_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print()
    if can_write("plots"):
        history, path = read_metrics(run_dir / METRICS_FILE), run_dir / "report.png"
        save_report(path, history, accuracy, trainer.average, puzzles, title)
        print(f"plot: {path}")
    print(f"weights: {checkpoint.latest(run_dir)}")
