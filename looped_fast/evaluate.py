"""Evaluate trained models: ``python -m looped_fast.evaluate runs/lr-looped-small-...``.

Writes the squared error as numbers (JSON, CSV) and figures (PNG, PDF): at every in-context
position against the baselines of the official figure, and over loop counts far beyond training;
with ``--ood``, on shifted distributions of prompts. Runs of ``train --model trm`` are evaluated on
puzzles that they were not trained on. ``--help`` lists all settings.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from looped_fast import errors
from looped_fast.evaluation import (
    MIN_PROMPTS,
    Curve,
    bootstrap_curve,
    evaluation_batches,
    figures,
    loop_errors,
    model_predictor,
    prompt_errors,
)
from looped_fast.evaluation.baselines import figure_baselines, quick_baselines
from looped_fast.evaluation.figures import OFFICIAL_LOOPS
from looped_fast.evaluation.puzzle_figures import save_report
from looped_fast.evaluation.puzzles import accuracy_table, solve_steps
from looped_fast.evaluation.report import can_write, error_table
from looped_fast.evaluation.shifts import SHIFTS, shifted_prompts
from looped_fast.pretrained.provenance import versions
from looped_fast.pretrained.runs import Run, load_run
from looped_fast.pretrained.trm import load_trm_run
from looped_fast.pretrained.weights import read_newest
from looped_fast.tasks import Baseline, Batch, task_label
from looped_fast.training import checkpoint
from looped_fast.training.command_line import parse, program, task_imports
from looped_fast.training.log import METRICS_FILE, read_metrics
from looped_fast.training.trm.config import is_trm


@dataclass(frozen=True)
class Command:
    """Evaluate trained models on held-out prompts, with baselines."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, checkpoints, or pretrained names such as lr-small; all of one task."""
    ood: bool = False
    """Evaluate on shifted distributions of prompts instead."""
    prompts: int = 1280
    """Number of held-out prompts, or puzzles."""
    seed: int = 0
    """Seed of prompts and bootstrap."""
    points: int | None = None
    """In-context points n of a prompt; none: as many as at the end of training."""
    loops: tuple[int, ...] = ()
    """Loop counts of looped models in the figure over positions, one curve each; none: the trained
    b, and (without --ood) that of the official figure: 500, dt 200."""
    max_loops: int = 500
    """Last loop step of the figure over loop counts; 0: no such figure."""
    loop_prompts: int = 256
    """Prompts of the figure over loop counts."""
    baselines: Literal["figure", "quick", "none"] = "figure"
    """figure: those of the official figure (minutes; with --ood, the quick ones); quick: those that
    take seconds; or none."""
    out: Path = Path("evaluation")
    """Folder to write to; files of an earlier evaluation are replaced."""
    device: str = "auto"
    """cpu, cuda, ...; auto: a GPU if there is one."""
    allow_task_import: bool = False
    """Import the module of a task that a run names by a path, which runs its code."""


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        command = parse(Command, args, program("evaluate"))
        with task_imports(command.allow_task_import):
            evaluate(command)
    except errors.EXPECTED as error:
        return errors.report(error)
    return 0


def evaluate(command: Command) -> dict[str, Any]:
    """Evaluate the runs of ``command``; return what is written as JSON.

    Raises:
        FileNotFoundError: no such run.
        ValueError: runs of different tasks, or settings that do not fit.
        RuntimeError: a baseline needs a package that is not installed.
    """
    _check(command)
    if command.runs and is_trm(read_newest(command.runs[0], checkpoint.load).config):
        return evaluate_puzzles(command)
    runs = load_runs(command.runs, command.device)
    n_points = command.points or min(run.config.n_points for run in runs)
    for run in runs:
        if n_points > run.config.n_positions:
            raise ValueError(
                f"points = {n_points} exceeds the {run.config.n_positions} positions of "
                f"{run.name}; lower --points"
            )
    command.out.mkdir(parents=True, exist_ok=True)
    drawn = " and figures" if can_write("plots") else ""  # before the work, which takes minutes
    results = provenance(command, runs)
    if command.ood:
        results["shifts"] = evaluate_shifts(command, runs, n_points)
    else:
        results["positions"] = evaluate_positions(command, runs, n_points)
        looped = [run for run in runs if run.config.model == "looped"]
        if looped and command.max_loops:
            results["loops"] = evaluate_loops(command, looped, n_points)
    path = command.out / ("ood.json" if command.ood else "evaluation.json")
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\nnumbers{drawn}: {command.out}")
    return results


def evaluate_puzzles(command: Command) -> dict[str, Any]:
    """Evaluate Tiny Recursive Models on ``command.prompts`` puzzles; return what is written."""
    for name in _OF_FUNCTIONS:
        if getattr(command, name) != getattr(Command, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {getattr(command, name)} is for models of function classes, and "
                f"{command.runs[0]} solves puzzles; leave it out"
            )
    runs = [load_trm_run(source, command.device) for source in command.runs]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{len(twice)} runs are named {twice[0]}; evaluate each in a command")
    command.out.mkdir(parents=True, exist_ok=True)
    drawn = " and pictures" if can_write("plots") else ""
    accuracies, counts = {}, {}
    for run in runs:
        puzzles = run.config.make_task().evaluation_batch(command.prompts, command.seed)
        accuracies[run.name] = solve_steps(run.model, puzzles)
        counts[run.name] = len(puzzles.inputs)  # a data set may have fewer than asked for
        if drawn:
            history = read_metrics(run.path.resolve().parents[1] / METRICS_FILE)
            title = f"{run.name}, step {run.step}: {counts[run.name]} unseen puzzles"
            path = command.out / f"{run.name}.png"
            save_report(path, history, accuracies[run.name], run.model, puzzles, title)
    print(accuracy_table(accuracies))
    results = {
        "seed": command.seed,
        "versions": versions(),
        "runs": {
            run.name: {
                "task": run.config.task,
                "checkpoint": str(run.path),
                "sha256": run.sha256,
                "step": run.step,
                "puzzles": counts[run.name],
                "accuracy": accuracies[run.name].to_dict(),
            }
            for run in runs
        },
    }
    path = command.out / "evaluation.json"
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\nnumbers{drawn}: {command.out}")
    return results


_OF_FUNCTIONS = ("ood", "points", "loops", "max_loops", "loop_prompts", "baselines")


def _check(command: Command) -> None:
    for name in ("prompts", "loop_prompts"):
        if getattr(command, name) < MIN_PROMPTS:
            raise ValueError(
                f"{name} = {getattr(command, name)}: at least {MIN_PROMPTS} are needed for a "
                f"5-95 % bootstrap band"
            )
    limits = [("seed", command.seed, 0), ("max_loops", command.max_loops, 0)]
    limits += [("loops", n_loops, 1) for n_loops in command.loops]
    limits += [("points", command.points, 2)] if command.points is not None else []
    for name, value, least in limits:
        if value < least:
            raise ValueError(f"{name} = {value}: at least {least} is needed")


def load_runs(sources: tuple[str, ...], device: str) -> list[Run]:
    """Load the runs; those that share a name are named by their source.

    Raises:
        FileNotFoundError: no such run.
        ValueError: none is given, two are the same, or they are of different tasks.
    """
    if not sources:
        raise ValueError("no run is given; name folders of runs, or pretrained models")
    runs = [load_run(source, device) for source in sources]
    paths = [run.path.resolve() for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(
                f"{sources[i]} is the same checkpoint as {sources[paths.index(path)]}, {path}; "
                f"name it once"
            )
    for run in runs[1:]:
        if run.task != runs[0].task:
            raise ValueError(
                f"{run.name} was trained on {run.task}, {runs[0].name} on {runs[0].task}; "
                f"evaluate runs of different tasks in separate commands"
            )
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=source)
        for run, source in zip(runs, sources, strict=True)
    ]


def provenance(command: Command, runs: list[Run]) -> dict[str, Any]:
    """What the numbers depend on: settings, checkpoints by hash, versions, device."""
    device = runs[0].device
    return {
        "task": repr(runs[0].task),
        "prompts": command.prompts,
        "seed": command.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "runs": {
            run.name: {
                "checkpoint": str(run.path),
                "sha256": run.sha256,
                "step": run.step,
                "trained_loops": run.config.n_loops,
                "loops": loop_counts(command, run),
            }
            for run in runs
        },
    }


def evaluate_positions(
    command: Command, runs: list[Run], n_points: int, known: Mapping[str, Curve] | None = None
) -> dict[str, Any]:
    """Error of runs and baselines by in-context position, over the task's variance.

    Curves in ``known`` are not computed again.
    """
    task, predictors = runs[0].task, _predictors(command, runs)
    batches = evaluation_batches(
        task, command.prompts, n_points, seed=command.seed, device=runs[0].device
    )
    prompts = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    curves = {}
    for name, predict in predictors.items():
        if known and name in known:
            curves[name] = known[name]
            continue
        started = time.perf_counter()
        errors = prompt_errors(predict, task, [prompts])
        curves[name] = bootstrap_curve(errors, seed=command.seed)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    title = f"{task_label(runs[0].config.task)}, {command.prompts} prompts"
    means = {name: torch.tensor(curve.mean) for name, curve in curves.items()}
    print(f"\n{title}\n{error_table(means)}")
    write_csv(command.out / "positions.csv", "examples", range(n_points), curves)
    if can_write("plots"):
        figure = figures.position_figure(curves, title, figures.axis_top(runs[0].config.task))
        figures.save(figure, command.out / "positions")
    return _as_dicts(curves)


def evaluate_loops(command: Command, runs: list[Run], n_points: int) -> dict[str, Any]:
    """Error of looped runs at the last position, after 1 .. max_loops loop steps."""
    task, counts = runs[0].task, range(1, command.max_loops + 1)
    curves = {}
    for run in runs:
        batches = evaluation_batches(
            task, command.loop_prompts, n_points, seed=command.seed, device=run.device
        )
        errors = loop_errors(run.model, task, batches, counts)[..., -1]  # [C, P]
        curves[run.name] = bootstrap_curve(errors.T, seed=command.seed)
    examples = f"after {n_points - 1} examples"
    title = f"{task_label(runs[0].config.task)}, {examples}, {command.loop_prompts} prompts"
    write_csv(command.out / "loops.csv", "loops", counts, curves)
    if can_write("plots"):
        trained = {run.name: run.config.n_loops for run in runs}
        figures.save(figures.loop_figure(curves, counts, trained, title), command.out / "loops")
    return {"prompts": command.loop_prompts, "curves": _as_dicts(curves)}


def evaluate_shifts(command: Command, runs: list[Run], n_points: int) -> dict[str, Any]:
    """Error by position under each shift, over the mean square of the targets."""
    task = runs[0].task
    panels: dict[str, dict[str, Curve]] = {}
    quick = "quick" if command.baselines == "figure" else command.baselines
    predictors = _predictors(replace(command, baselines=quick), runs)
    n_positions = min(run.config.n_positions for run in runs)
    for shift, settings in SHIFTS.items():
        n = n_points
        if settings.longer and n_positions == n_points:
            print(f"{shift}: left out, the models have no positions beyond {n_points} points")
            continue
        if settings.longer:
            n = n_positions
        elif settings.up_to_d:
            n = min(n_points, task.n_dims)
        started = time.perf_counter()
        prompts = shifted_prompts(
            shift, task, command.prompts, n, seed=command.seed, device=runs[0].device
        )
        variance = prompts.targets.double().square().mean()
        panels[shift] = {}
        for name, predict in predictors.items():
            predictions = predict(prompts.xs, prompts.ys, prompts.queries)
            errors = (predictions.double() - prompts.targets.double()).square() / variance
            panels[shift][name] = bootstrap_curve(errors.cpu(), seed=command.seed)
        print(f"{shift}: {time.perf_counter() - started:.1f} s", flush=True)
    title = f"{task_label(runs[0].config.task)}, {command.prompts} prompts"
    rows = {f"{shift}: {name}": c for shift, curves in panels.items() for name, c in curves.items()}
    write_csv(command.out / "ood.csv", "examples", range(n_positions), rows)
    if can_write("plots"):
        top = figures.axis_top(runs[0].config.task)
        figures.save(figures.shift_figure(panels, title, top), command.out / "ood")
    return {shift: _as_dicts(curves) for shift, curves in panels.items()}


def write_csv(path: Path, unit: str, counts: Sequence[int], curves: Mapping[str, Curve]) -> None:
    """Write mean, low and high of each predictor, one line per count of ``unit``."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("predictor", unit, "mean", "low", "high"))
        for name, curve in curves.items():
            for count, *values in zip(counts, curve.mean, curve.low, curve.high, strict=False):
                writer.writerow((name, count, *values))


def _predictors(command: Command, runs: list[Run]) -> dict[str, Baseline]:
    """Runs at each of their loop counts, then the baselines of the command."""
    baselines: dict[str, Baseline] = {}
    if command.baselines == "figure":
        baselines = figure_baselines(runs[0].task)
    elif command.baselines == "quick":  # "zero" is the dashed line
        baselines = quick_baselines(runs[0].task)
        del baselines["zero"]
    models = {
        run.name if n_loops == run.config.n_loops else f"{run.name}, {n_loops} loops": (
            model_predictor(run.model, n_loops)
        )
        for run in runs
        for n_loops in loop_counts(command, run)
    }
    return models | baselines


def loop_counts(command: Command, run: Run) -> list[int]:
    """Loop counts of a run in the figure over positions."""
    config = run.config
    if config.model != "looped":
        return [config.n_loops]
    official = OFFICIAL_LOOPS.get(config.task, OFFICIAL_LOOPS["lr"])  # noisy_lr has no figure
    default = [config.n_loops] if command.ood else [config.n_loops, official]
    return list(dict.fromkeys(command.loops or default))


def _as_dicts(curves: Mapping[str, Curve]) -> dict[str, dict[str, list[float]]]:
    return {name: asdict(curve) for name, curve in curves.items()}


if __name__ == "__main__":
    sys.exit(main())
