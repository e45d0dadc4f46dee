"""Run one of the paper's ablations: ``python -m looped_fast.sweep injection --preset tiny``.

Every run of a sweep is an ordinary training run in a folder of its own; the same command resumes a
stopped sweep. ``--help`` lists the sweeps, ``ablations.py`` holds them.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tabulate import tabulate

from looped_fast import errors
from looped_fast.errors import check_name
from looped_fast.evaluation import (
    MIN_PROMPTS,
    bootstrap_curve,
    evaluation_batches,
    loop_errors,
)
from looped_fast.evaluation.report import can_write
from looped_fast.paper.ablations import SWEEPS
from looped_fast.paper.experiments import last_checkpoint, shortened
from looped_fast.pretrained.provenance import versions, weights_sha256
from looped_fast.tasks import task_label
from looped_fast.training import lock
from looped_fast.training.command_line import import_named_tasks, parse, program
from looped_fast.training.config import TrainConfig, config_from_dict
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Interrupted, Trainer

RESULTS_FILE = "sweep.json"
FAR = 4  # a run is evaluated up to this multiple of its trained loop count


@dataclass(frozen=True)
class Command:
    """Train and compare the runs of one ablation of the paper.

    Sweeps: loops_and_window, injection, layers, heads, width, prompts, loop_schedule.
    """

    name: tyro.conf.Positional[str]
    """The sweep."""
    task: str = "lr"
    """Function class: a name, or one of yours as mypackage.module:MyTask."""
    preset: str = "small"
    """Scale: tiny, small or paper."""
    steps: int | None = None
    """Training steps of every run, with the curriculum in proportion; none: the preset's."""
    prompts: int = 1280
    """Held-out prompts of the evaluation."""
    seed: int = 42
    """Seed of initial weights and data."""
    out: Path | None = None
    """Folder of the sweep; none: sweeps/<name>-<task>-<preset>."""


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        command = parse(Command, args, program("sweep"))
        import_named_tasks(command.task)
        stem = f"{command.name}-{task_label(command.task)}-{command.preset}"
        out = command.out or Path("sweeps") / stem
        runs = sweep_runs(
            command.name, command.task, command.preset, steps=command.steps, seed=command.seed
        )
        can_write("plots", "TensorBoard events")  # says now what will be left out
        results = run(runs, out, command.prompts)
        steps = next(iter(runs.values())).steps
        description = {
            "name": command.name,
            "question": SWEEPS[command.name].__doc__,
            "scale": f"{task_label(command.task)}, {command.preset}, {steps} steps",
            "prompts": command.prompts,
            "seed": command.seed,
        }
        write(description, results, out)
    except Interrupted as stop:
        print(f"\n{stop}: the run is saved. The same command resumes it.")
        return 128 + stop.signum
    except errors.EXPECTED as error:
        return errors.report(error)
    print(f"\n{results_table(results)}\n\nnumbers: {out / RESULTS_FILE}")
    if can_write("plots"):
        print(f"plot: {out / 'sweep.png'}")
    return 0


def sweep_runs(
    name: str, task: str, preset: str, *, steps: int | None = None, seed: int = 42
) -> dict[str, TrainConfig]:
    """The settings of each run of a sweep, by label.

    Raises:
        ValueError: an unknown sweep, task or preset, or a value out of range.
    """
    check_name("sweep", name, SWEEPS)
    runs = {}
    for label, changes in SWEEPS[name](preset_config(preset, task)).items():
        base = preset_config(preset, task, changes.get("model", "looped"))
        config = config_from_dict({**changes, "seed": seed}, base)
        runs[label] = config if steps is None else shortened(config, steps)
    return runs


def run(runs: dict[str, TrainConfig], out: Path, n_prompts: int) -> dict[str, Any]:
    """Train (or resume) each run in a folder of ``out``, and evaluate it.

    Returns:
        Label -> ``n_loops`` trained with, ``sha256`` of the weights, ``by_position`` (the
        ``Curve`` of squared error / variance) and ``by_loops`` (at the last position, after
        1, 2, ... loops).

    Raises:
        ValueError: too few prompts for a band, or a folder holds a run with other settings.
        Interrupted: a signal came; what was trained is saved.
    """
    if n_prompts < MIN_PROMPTS:
        raise ValueError(
            f"prompts = {n_prompts}: at least {MIN_PROMPTS} are needed for a 5-95 % bootstrap band"
        )
    results = {}
    for i, (label, config) in enumerate(runs.items(), 1):
        name = re.sub(r"[^\w=.]+", "-", label).strip("-")
        run_dir = out / f"{i}-{name}"
        config = dataclasses.replace(config, out=str(run_dir))
        print(f"[{i}/{len(runs)}] {label}: {config.steps} steps in {run_dir}", flush=True)
        with lock.hold(run_dir):
            trainer = Trainer(config, run_dir, last_checkpoint(config, run_dir))
            trainer.fit()
        results[label] = _evaluate(trainer, n_prompts)
    return results


def _evaluate(trainer: Trainer, n_prompts: int) -> dict[str, Any]:
    config = trainer.config
    looped = config.model == "looped"
    counts = list(range(1, FAR * config.n_loops + 1)) if looped else [config.n_loops]
    batches = evaluation_batches(
        trainer.task, n_prompts, config.n_points, seed=config.seed, device=trainer.device
    )
    errors = loop_errors(
        trainer.model, trainer.task, batches, counts, autocast=trainer.autocast
    )  # [C, P, n]
    trained = counts.index(config.n_loops)
    return {
        "n_loops": config.n_loops,
        "sha256": weights_sha256(trainer.run_dir),
        "by_position": dataclasses.asdict(bootstrap_curve(errors[trained], seed=config.seed)),
        "by_loops": errors[:, :, -1].double().mean(1).tolist(),
    }


def write(description: dict[str, Any], results: dict[str, Any], out: Path) -> None:
    """Write ``sweep.json``, ``sweep.csv`` (all points of all curves) and ``sweep.png``."""
    document = {**description, "versions": versions(), "runs": results}
    (out / RESULTS_FILE).write_text(json.dumps(document), encoding="utf-8")
    with (out / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["run", "curve", "at", "error"])
        for label, result in results.items():
            for i, error in enumerate(result["by_position"]["mean"]):
                table.writerow([label, "in-context examples", i, error])
            for i, error in enumerate(result["by_loops"], 1):
                table.writerow([label, "loops", i, error])
    if can_write("plots"):
        plot(out / "sweep.png", results, f"{description['name']}: {description['scale']}")


def results_table(results: dict[str, Any]) -> str:
    """Each run's error at the last position, at the trained loop count and at twice that."""
    rows = []
    for label, result in results.items():
        b, by_loops = result["n_loops"], result["by_loops"]
        twice = by_loops[2 * b - 1] if len(by_loops) > 1 else None
        rows.append((label, result["by_position"]["mean"][-1], twice))
    headers = ["squared error / variance at the end", "b loops", "2b loops"]
    return tabulate(rows, headers, floatfmt=".4f")


def plot(path: Path, results: dict[str, Any], title: str) -> None:
    """Plot error by in-context examples with its band, and by loops at the last position."""
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for label, result in results.items():
        curve = result["by_position"]
        examples = range(len(curve["mean"]))
        (line,) = left.plot(examples, curve["mean"], label=label)
        left.fill_between(examples, curve["low"], curve["high"], alpha=0.2, color=line.get_color())
        if len(result["by_loops"]) == 1:  # one pass has no loop count to vary
            right.axhline(result["by_loops"][0], color=line.get_color(), linestyle="--")
            continue
        right.plot(range(1, len(result["by_loops"]) + 1), result["by_loops"])
        right.plot(result["n_loops"], curve["mean"][-1], "o", color=line.get_color())
    left.set(xlabel="in-context examples", ylabel="squared error / variance", yscale="log")
    right.set(xlabel="loops (dot: as trained)", title="at the last position", xscale="log")
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
