"""The paper's OpenML experiment: train on all tabular sets but one, classify that one in context.

    python -m looped_fast.openml --preset tiny                # ten sets that need no network
    python -m looped_fast.openml --preset paper --data openml

Each set is held out once, for a looped and for a standard model; the same command resumes a stopped
experiment. Source: arXiv 2311.12424, appendix on OpenML; official ``scripts/train_openml.py`` and
``jupyter_notebooks/Openml.ipynb``.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import cross_entropy

from looped_fast import errors
from looped_fast.config import ModelConfig
from looped_fast.errors import check_name
from looped_fast.evaluation.baselines import nearest_neighbours
from looped_fast.evaluation.report import can_write
from looped_fast.paper.experiments import last_checkpoint, shortened
from looped_fast.paper.tabular_data import (
    TabularSet,
    check_fits,
    held_out_prompts,
    load_sets,
    training_prompts,
)
from looped_fast.pretrained.provenance import versions, weights_sha256
from looped_fast.training import checkpoint, lock
from looped_fast.training.command_line import parse, program
from looped_fast.training.config import TrainConfig, config_from_dict
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Interrupted, Trainer

PAPER_STEPS = 100_000  # official exec/script_openml.sh
RESULTS_FILE = "openml.json"
MODELS = ("looped", "standard")


@dataclass(frozen=True)
class TabularConfig(TrainConfig):
    """Settings of a run on tabular sets: those of ``lr``, as officially, and the sets."""

    data: str = "offline"
    """Collection of sets: offline or openml."""
    held_out: str = ""
    """The set that is not trained on."""


class TabularTrainer(Trainer):
    """Trains a two-class model on prompts of all ``sets`` but ``config.held_out``.

    Raises:
        ValueError: no such set, or one that does not fit a prompt; or as in ``Trainer``.
    """

    config: TabularConfig

    def __init__(
        self,
        config: TabularConfig,
        sets: list[TabularSet],
        run_dir: Path,
        resume: checkpoint.Checkpoint | None = None,
    ) -> None:
        names = [s.name for s in sets]
        check_name("set", config.held_out, names)
        for each in sets:
            check_fits(each, config.n_points, config.n_dims)
        self.training_sets = [s for s in sets if s.name != config.held_out]
        self.test_set = next(s for s in sets if s.name == config.held_out)
        super().__init__(config, run_dir, resume)
        shape = (config.batch_size, config.n_points)
        self._xs = torch.zeros(*shape, config.n_dims, device=self.device)
        self._ys = torch.zeros(shape, device=self.device)

    def _model_config(self) -> ModelConfig:
        return dataclasses.replace(super()._model_config(), pred_type="classification")

    def _set_inputs(self) -> None:
        super()._set_inputs()
        config = self.config
        xs, ys = training_prompts(
            self.training_sets, config.batch_size, config.n_points, config.n_dims,
            seed=config.seed, step=self.step,
        )  # fmt: skip
        self._xs.copy_(xs)
        self._ys.copy_(ys)

    def _loss(self, n_points: int, n_loops: int, objective: object = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy over positions and the window's predictions, and that of a coin flip.

        ``objective`` is a squared error, which does not suit classes, and is not used.
        """
        xs, ys = self._xs[:, :n_points], self._ys[:, :n_points]
        with self.autocast():
            window = min(self.config.window, n_loops)
            logits = self.model(xs, ys, n_loops, window)  # [W, B, n, 2]
        logits = logits[-self.config.supervised_window :]
        labels = ys.long().expand(logits.shape[:-1])
        loss = cross_entropy(logits.flatten(0, 2), labels.flatten())
        return loss, torch.full_like(loss, math.log(2))

    def evaluate(self, n_prompts: int) -> dict[str, list[float]]:
        """Error rate on the held-out set by position, {loop count: [n]}, at T, b and 2b loops."""
        errors = {}
        for n_loops in self.loop_counts():
            wrong = self.is_wrong(n_prompts, n_loops, self.config.seed)
            errors[str(n_loops)] = wrong.float().mean(0).tolist()
        return errors

    def is_wrong(self, n_prompts: int, n_loops: int, seed: int) -> Tensor:
        """True where the model errs on at most ``n_prompts`` held-out prompts: [P, n] bool."""
        config, wrong = self.config, []
        prompts = held_out_prompts(
            self.test_set, config.n_points, config.n_dims, rows=n_prompts, seed=seed
        )
        for xs, ys in zip(prompts.xs.split(_CHUNK), prompts.ys.split(_CHUNK), strict=True):
            with torch.no_grad(), self.autocast():
                logits = self.model(xs.to(self.device), ys.to(self.device), n_loops, 1)[-1]
            wrong.append(logits.argmax(-1).cpu() != ys)
        return torch.cat(wrong)


_CHUNK = 256  # prompts in memory at once


def tabular_config(
    preset: str, model: str, data: str, held_out: str, *, steps: int | None = None, seed: int = 42
) -> TabularConfig:
    """The settings of one run: 20 columns, 40 prompts a step, a curriculum of loops only.

    Raises:
        ValueError: an unknown preset or model, or a value out of range.
    """
    base = preset_config(preset, "lr", model)
    if steps is not None:
        base = shortened(base, steps)
    elif preset == "paper":
        base = dataclasses.replace(base, steps=PAPER_STEPS)
    at_once = {"start": None}
    changes = {
        "n_dims": 20,
        "batch_size": 40,
        "curriculum": {"dims": at_once, "points": at_once},
        "seed": seed,
    }
    config = config_from_dict(changes, base)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return TabularConfig(**fields, data=data, held_out=held_out)


@dataclass(frozen=True)
class Command:
    """Leave each tabular set out in turn, and classify it in context: looped against standard."""

    data: Literal["offline", "openml"] = "offline"
    """offline: sets of scikit-learn and generated ones; openml: the paper's, cached."""
    preset: str = "small"
    """Scale: tiny, small or paper."""
    steps: int | None = None
    """Training steps of every run; none: the preset's (paper: 100,000)."""
    test_sets: tuple[str, ...] = ()
    """Sets to hold out; none: each of them."""
    test_rows: int = 1000
    """Most rows of a set to classify."""
    test_seeds: int = 5
    """Random choices of rows and contexts, over which accuracy is averaged."""
    seed: int = 42
    """Seed of initial weights and data."""
    out: Path | None = None
    """Folder of the experiment; none: openml/<data>-<preset>."""


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        command = parse(Command, args, program("openml"))
        out = command.out or Path("openml") / f"{command.data}-{command.preset}"
        sets = load_sets(command.data)
        can_write("plots", "TensorBoard events")  # says now what will be left out
        results = run(command, sets, out)
        write(command, results, out)
    except Interrupted as stop:
        print(f"\n{stop}: the run is saved. The same command resumes it.")
        return 128 + stop.signum
    except errors.EXPECTED as error:
        return errors.report(error)
    print(f"\n{results_table(results)}\n\nnumbers: {out / RESULTS_FILE}")
    if can_write("plots"):
        print(f"plot: {out / 'openml.png'}")
    return 0


def run(command: Command, sets: list[TabularSet], out: Path) -> dict[str, Any]:
    """Train (or resume) and test every model on every held-out set.

    Returns:
        Set -> ``looped``, ``standard``, ``3-nearest neighbours``, ``majority`` -> (mean accuracy
        at the last position, its standard deviation over seeds), ``rows``, and ``sha256`` of the
        weights of each model.

    Raises:
        ValueError: an unknown set, no seed, or a folder that holds a run with other settings.
        Interrupted: a signal came; what was trained is saved.
    """
    if command.test_seeds < 1 or command.test_rows < 1:
        raise ValueError(
            f"test_seeds = {command.test_seeds}, test_rows = {command.test_rows}: at least 1 of "
            f"each is needed"
        )
    names = tuple(s.name for s in sets)
    for name in command.test_sets:
        check_name("set", name, names)
    seeds = range(command.seed, command.seed + command.test_seeds)
    results: dict[str, Any] = {}
    for name in command.test_sets or names:
        for model in MODELS:
            config = tabular_config(
                command.preset, model, command.data, name, steps=command.steps, seed=command.seed
            )
            run_dir = out / f"{model}-{name.replace(' ', '-')}"
            config = dataclasses.replace(config, out=str(run_dir))
            print(f"{name} held out, {model}: {config.steps} steps in {run_dir}", flush=True)
            with lock.hold(run_dir):
                trainer = TabularTrainer(config, sets, run_dir, last_checkpoint(config, run_dir))
                trainer.fit()
            wrong = [trainer.is_wrong(command.test_rows, config.n_loops, s)[:, -1] for s in seeds]
            row = results.setdefault(name, {"rows": len(wrong[0]), "sha256": {}})
            row[model] = _accuracy(wrong)
            row["sha256"][model] = weights_sha256(run_dir)
        prompts = [
            held_out_prompts(
                trainer.test_set, config.n_points, config.n_dims, rows=command.test_rows, seed=s
            )
            for s in seeds
        ]
        neighbours = [(nearest_neighbours(*p)[:, -1] > 0.5) != p.ys[:, -1] for p in prompts]
        majority = [(p.ys[:, :-1].mean(1) > 0.5) != p.ys[:, -1] for p in prompts]
        row["3-nearest neighbours"], row["majority"] = _accuracy(neighbours), _accuracy(majority)
    return results


def _accuracy(wrong: list[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of the accuracy over seeds."""
    right = [1 - w.double().mean().item() for w in wrong]
    return float(np.mean(right)), float(np.std(right))


def write(command: Command, results: dict[str, Any], out: Path) -> None:
    """Write ``openml.json``, ``openml.csv`` and ``openml.png`` to ``out``."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(command).items()}
    document = {"settings": settings, "versions": versions(), "sets": results}
    (out / RESULTS_FILE).write_text(json.dumps(document), encoding="utf-8")
    with (out / "openml.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["set", "predictor", "accuracy", "standard deviation over seeds"])
        for name, row in results.items():
            for predictor in PREDICTORS:
                table.writerow([name, predictor, *row[predictor]])
    if can_write("plots"):
        plot(out / "openml.png", results)


PREDICTORS = (*MODELS, "3-nearest neighbours", "majority")


def results_table(results: dict[str, Any]) -> str:
    """Accuracies of all predictors on each set, and their mean over sets."""
    rows = [[name, *(row[p][0] for p in PREDICTORS)] for name, row in results.items()]
    means = [float(np.mean([row[p][0] for row in results.values()])) for p in PREDICTORS]
    headers = ["accuracy on the held-out set", *PREDICTORS]
    return tabulate([*rows, ["mean", *means]], headers, floatfmt=".3f")


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plot accuracy on each held-out set, one group of bars per set (PNG)."""
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(PREDICTORS)
    for i, predictor in enumerate(PREDICTORS):
        means, deviations = zip(*(row[predictor] for row in results.values()), strict=True)
        places = np.arange(len(results)) + (i - (len(PREDICTORS) - 1) / 2) * width
        axes.bar(places, means, width, yerr=deviations, label=predictor)
    axes.set_xticks(range(len(results)), list(results))
    axes.set(ylabel="accuracy, set held out", ylim=(0.3, 1))
    axes.legend(fontsize="small", ncols=len(PREDICTORS))
    figure.savefig(path, dpi=80)
