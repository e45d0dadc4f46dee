"""Regenerate the paper's figures: ``python -m looped_fast.reproduce [figure ...]``.

Numbers go to ``docs/results/<figure>.json``, figures beside them, and ``docs/results.md`` compares
them with the published values. What is up to date is not computed again, so that figures can be
made one at a time. Models come from the package (``looped_fast.pretrained``) or from ``runs/``;
sweeps and OpenML runs from ``sweeps/`` and ``openml/``. Anything missing is named with the command
that makes it, or trained first with ``--train``, at the paper's scale with ``--preset paper``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from looped_fast import errors, evaluate, pretrained, train
from looped_fast.errors import check_name, read_json
from looped_fast.evaluation import Curve
from looped_fast.evaluation.baselines import figure_baselines
from looped_fast.evaluation.report import can_write
from looped_fast.model import LoopedTransformer
from looped_fast.paper import openml, state_probes, sweep
from looped_fast.paper.ablations import SWEEPS
from looped_fast.paper.results_figures import draw
from looped_fast.paper.results_page import as_written, numbers_file, read_numbers, write_page
from looped_fast.pretrained.provenance import versions
from looped_fast.pretrained.runs import Run, load_run
from looped_fast.tasks import sample_batch
from looped_fast.training import checkpoint
from looped_fast.training.command_line import parse, program
from looped_fast.training.distributed import resolve_device, single_process
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import step_flops

MODELS = ("looped", "standard")
LOOPS = 500  # the paper's largest loop count
MEASURED_PROMPTS = 2  # on which a paper-scale step is timed

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """Regenerate the figures of the paper and the page of results.

    Figures: lr, sparse_lr, dt, relu_2nn, ood, ablations, probes, openml, speed.
    """

    figures: tyro.conf.Positional[tuple[str, ...]] = ()
    """Figures to make; none: all."""
    preset: str = "small"
    """Scale of the models: tiny, small or paper."""
    prompts: int = 1280
    """Held-out prompts of an evaluation."""
    probe_steps: int = 2000
    """Training steps of probes."""
    seed: int = 0
    """Seed of prompts, bootstrap and probes."""
    train: bool = False
    """Train what is missing."""
    work: Path = Path(".")
    """Folder that holds runs/, sweeps/ and openml/."""
    out: Path = Path("docs")
    """Folder of results.md and results/."""
    device: str = "auto"
    """cpu, cuda, ...; auto: a GPU if there is one."""


class Missing(Exception):
    """A model or result does not exist; the message is the command that makes it."""


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status: 3 if anything is missing."""
    try:
        command = parse(Command, args, program("reproduce"))
        single_process()  # several processes would each do all the work
        for name in command.figures:
            check_name("figure", name, FIGURES)
        (command.out / "results").mkdir(parents=True, exist_ok=True)
        can_write("plots")  # says now what will be left out
        is_complete = all([make(name, command) for name in command.figures or FIGURES])
        write_page(command.out)
    except errors.EXPECTED as error:
        return errors.report(error)
    print(f"page: {command.out / 'results.md'}")
    return 0 if is_complete else 3


def make(name: str, command: Command) -> bool:
    """Bring one figure up to date as far as possible; return True if nothing is missing."""
    earlier = read_numbers(command.out, name)
    started = time.perf_counter()
    missing: list[str] = []
    numbers = FIGURES[name](command, earlier, missing)
    for how in missing:
        print(f"{name}: missing; make it with: {how}")
    document = json.dumps(_rounded({**numbers, "missing": missing}))
    numbers_file(command.out, name).write_text(document, encoding="utf-8")
    if can_write("plots"):
        draw(name, command.out)
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return not missing


def _rounded(value: Any) -> Any:
    """Round floats to five digits: the page shows fewer, and files stay small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def find_model(command: Command, task: str, model: str) -> Run:
    """The trained model of that task at the command's preset.

    Raises:
        Missing: there is none, and the command does not train.
    """
    kind = "" if model == "looped" else f"-{model}"
    shipped = f"{task}{kind}-{command.preset}"
    if shipped in pretrained.names():
        return _named(load_run(pretrained.path(shipped), command.device), model)
    run_dir = command.work / "runs" / f"{task}-{model}-{command.preset}"
    line = ["--task", task, "--model", model, "--preset", command.preset]
    line += ["--out", run_dir.as_posix()]  # which no shell needs in quotes
    if checkpoint.latest(run_dir) is None:
        _train_or_name(command, "train", train.main, line)
    run = load_run(run_dir, command.device)
    if command.train and run.step < run.config.steps:
        _train_or_name(command, "train", train.main, ["--resume", str(run_dir)])
        run = load_run(run_dir, command.device)
    return _named(run, model)


def _named(run: Run, name: str) -> Run:
    return dataclasses.replace(run, name=name)


def _train_or_name(
    command: Command, module: str, run: Callable[[list[str]], int], line: list[str]
) -> None:
    if not command.train:
        raise Missing(f"python -m looped_fast.{module} {shlex.join(line)}")
    status = run(line)
    if status:
        raise RuntimeError(f"looped_fast.{module} ended with status {status}; see its message")


def find_models(command: Command, task: str, missing: list[str]) -> list[Run]:
    """The existing ones of ``MODELS``; commands that make the others go to ``missing``.

    Raises:
        ValueError: the models learned different tasks.
    """
    found: list[Run] = []
    for model in MODELS:
        try:
            found.append(find_model(command, task, model))
        except Missing as how:
            missing.append(str(how))
    for run in found[1:]:
        if run.task != found[0].task:
            raise ValueError(
                f"{run.path} learned {run.task}, {found[0].path} {found[0].task}: they can't be "
                f"compared; train both on one task"
            )
    return found


def up_to_date(
    earlier: Numbers,
    key: dict[str, Any],
    compute: Callable[[], Numbers],
    packages: Sequence[str] = ("torch",),
) -> Numbers:
    """``earlier`` if its key is ``key`` with ``packages``, else a new ``compute()`` under it."""
    # A key read from a file went through JSON, which turns tuples into lists.
    key = json.loads(json.dumps({**key, "versions": versions(packages)}))
    return earlier if earlier.get("key") == key else {"key": key, **compute()}


def describe(run: Run) -> dict[str, Any]:
    """The facts that the page shows of a model."""
    config = run.config
    names = ("task", "n_dims", "n_points", "n_embd", "n_layer", "n_loops", "window")
    settings = {name: getattr(config, name) for name in names}
    settings["depth"] = config.task_options.get("depth")
    parameters = sum(p.numel() for p in run.model.parameters())
    trained = {"step": run.step, "steps": config.steps, "parameters": parameters}
    return {**settings, **trained, "sha256": run.sha256}


def positions_and_loops(task: str) -> Callable[[Command, Numbers, list[str]], Numbers]:
    """A function class: error by in-context position against its baselines, and by loop count."""

    def numbers(command: Command, earlier: Numbers, missing: list[str]) -> Numbers:
        runs = find_models(command, task, missing)
        if not runs:
            return earlier
        n_points = min(run.config.n_points for run in runs)
        settings = _evaluation(command, task)
        loops = {run.name: evaluate.loop_counts(settings, run) for run in runs}
        # Baselines take minutes and do not depend on the models: keep those of an earlier call.
        baseline_key = {
            "task": repr(runs[0].task), "points": n_points, "prompts": command.prompts,
            "seed": command.seed, "versions": versions(),
        }  # fmt: skip
        known: dict[str, Curve] = {}
        if earlier.get("key", {}).get("baselines") == baseline_key:
            names = figure_baselines(runs[0].task)
            with as_written(numbers_file(command.out, task)):
                known = {n: Curve(**c) for n, c in earlier["positions"].items() if n in names}

        def compute() -> Numbers:
            settings.out.mkdir(parents=True, exist_ok=True)
            numbers = {"positions": evaluate.evaluate_positions(settings, runs, n_points, known)}
            looped = [run for run in runs if run.name == "looped"]
            if looped:
                numbers["loops"] = evaluate.evaluate_loops(settings, looped, n_points)
            return numbers

        key = {**_key(command, runs), "loops": loops, "baselines": baseline_key}
        return up_to_date(earlier, key, compute, ("torch", "numpy"))

    return numbers


def out_of_distribution(command: Command, earlier: Numbers, missing: list[str]) -> Numbers:
    """Linear regression on prompts from other distributions."""
    runs = find_models(command, "lr", missing)
    if not runs:
        return earlier
    n_points = min(run.config.n_points for run in runs)
    settings = _evaluation(command, "ood")

    def compute() -> Numbers:
        settings.out.mkdir(parents=True, exist_ok=True)
        return {"shifts": evaluate.evaluate_shifts(settings, runs, n_points)}

    return up_to_date(earlier, _key(command, runs), compute, ("torch", "numpy"))


def _evaluation(command: Command, name: str) -> evaluate.Command:
    return evaluate.Command(
        (), ood=name == "ood", prompts=command.prompts, seed=command.seed, max_loops=LOOPS,
        loop_prompts=min(command.prompts, 256), out=command.work / "evaluations" / name,
        device=command.device,
    )  # fmt: skip


def _key(command: Command, runs: list[Run]) -> dict[str, Any]:
    models = {run.name: describe(run) for run in runs}
    return {"models": models, "prompts": command.prompts, "seed": command.seed}


def ablations(command: Command, earlier: Numbers, missing: list[str]) -> Numbers:
    """Every sweep that was run, at any scale; those not run at this preset's are missing."""
    sweeps = {**earlier.get("sweeps", {}), **_finished(command, "sweeps", sweep.RESULTS_FILE)}
    for name in SWEEPS:
        out = command.work / "sweeps" / f"{name}-lr-{command.preset}"
        if out.name in sweeps:
            continue
        line = [name, "--preset", command.preset, "--out", out.as_posix()]
        try:
            _train_or_name(command, "sweep", sweep.main, line)
        except Missing as how:
            missing.append(str(how))
    return {"sweeps": {**sweeps, **_finished(command, "sweeps", sweep.RESULTS_FILE)}}


def _finished(command: Command, kind: str, results_file: str) -> dict[str, Numbers]:
    """Results of the sweeps or OpenML experiments that were run, by their folder's name.

    Raises:
        ValueError: a file of results is damaged; the message names it.
    """
    found = {}
    for path in sorted(command.work.glob(f"{kind}/*/{results_file}")):
        results = read_json(path)
        needed = {"sweeps": ("scale", "runs"), "openml": ("settings", "sets")}[kind]
        with as_written(path):
            if missing := [part for part in needed if part not in results]:
                raise KeyError(*missing)
        found[path.parent.name] = results
    return found


def probes(command: Command, earlier: Numbers, missing: list[str]) -> Numbers:
    """Probes of the hidden states for X^T y and w_OLS, with their control."""
    runs = find_models(command, "lr", missing)
    if not runs:
        return earlier
    settings = state_probes.Settings(
        steps=command.probe_steps, test_prompts=command.prompts, seed=command.seed
    )

    def compute() -> Numbers:
        return {
            "runs": {
                run.name: {
                    "probes": state_probes.probe(run, settings),
                    "control": state_probes.probe(run, settings, control=True),
                }
                for run in runs
            }
        }

    key = {**_key(command, runs), "settings": dataclasses.asdict(settings)}
    return up_to_date(earlier, key, compute)


def tabular(command: Command, earlier: Numbers, missing: list[str]) -> Numbers:
    """OpenML experiments that were run, on any sets; this preset's may be missing."""
    found = {**earlier.get("experiments", {}), **_finished(command, "openml", openml.RESULTS_FILE)}
    data = "openml" if command.preset == "paper" else "offline"
    out = command.work / "openml" / f"{data}-{command.preset}"
    if out.name not in found:
        line = ["--data", data, "--preset", command.preset, "--out", out.as_posix()]
        try:
            _train_or_name(command, "openml", openml.main, line)
            found |= _finished(command, "openml", openml.RESULTS_FILE)
        except Missing as how:
            missing.append(str(how))
    return {"experiments": found}


def speed(command: Command, earlier: Numbers, missing: list[str]) -> Numbers:
    """Measured time of a paper-scale training step, and the FLOPs of the whole training."""
    device = resolve_device(command.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    cores = 1 if device.type == "cuda" else os.cpu_count() or 1
    key = {"hardware": hardware, "cores": cores, "prompts": MEASURED_PROMPTS}

    def compute() -> Numbers:
        rows = {}
        for task in ("lr", "sparse_lr", "dt", "relu_2nn"):
            for model in MODELS:
                config = preset_config("paper", task, model)
                curriculum, stride = config.make_curriculum(), config.steps // 1000
                steps = range(0, config.steps, stride)
                rows[f"{task}, {model}"] = {
                    "seconds": _step_seconds(task, model, device),
                    "flops": step_flops(config, curriculum.at(config.steps)),
                    "total_flops": stride
                    * sum(step_flops(config, curriculum.at(step)) for step in steps),
                    "steps": config.steps,
                    "batch_size": config.batch_size,
                }
        return {"steps": rows, "date": time.strftime("%Y-%m-%d")}

    return up_to_date(earlier, key, compute)


def _step_seconds(task: str, model: str, device: torch.device) -> float:
    """Time of a paper-scale forward and backward in the last stage of the curriculum.

    Measured on ``MEASURED_PROMPTS`` prompts and scaled: sequences do not depend on each other. On
    a CPU it is processor time of all threads, which other programs hardly change.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    config = preset_config("paper", task, model)
    learner = LoopedTransformer(config.model_config()).to(device)
    xs, ys = sample_batch(
        config.make_task(), MEASURED_PROMPTS, config.n_points, seed=0, step=0, device=device
    )
    seconds = float("inf")
    for _ in range(3):  # the first warms up
        started = clock()
        loss = learner.loss(xs, ys, n_supervised=config.supervised_window)
        gradients = torch.autograd.grad(loss, list(learner.parameters()))
        gradients[0].sum().item()  # waits for a GPU
        seconds = min(seconds, clock() - started)
    return seconds * config.batch_size / MEASURED_PROMPTS


def _cpu_name() -> str:
    """The processor's name from the kernel, or else from ``platform``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


FIGURES: dict[str, Callable[[Command, Numbers, list[str]], Numbers]] = {
    "lr": positions_and_loops("lr"),
    "sparse_lr": positions_and_loops("sparse_lr"),
    "dt": positions_and_loops("dt"),
    "relu_2nn": positions_and_loops("relu_2nn"),
    "ood": out_of_distribution,
    "ablations": ablations,
    "probes": probes,
    "openml": tabular,
    "speed": speed,
}
