"""Train a transformer on a function class: ``python -m looped_fast.train --task dt --amp bf16``.

The command line overrides settings of a preset or a YAML file; ``--help`` lists all settings.
``--model trm`` trains a Tiny Recursive Model on puzzles, and ``--model trm --help`` lists its own.
``torchrun --nproc-per-node 4 -m looped_fast.train ...`` trains with a batch in each process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from looped_fast import errors
from looped_fast.compat.config_files import load_config
from looped_fast.config import VERSION
from looped_fast.dropin.explain import explain_backend
from looped_fast.errors import check_name
from looped_fast.evaluation import evaluation_batches, position_errors
from looped_fast.evaluation.baselines import quick_baselines
from looped_fast.evaluation.report import can_write, error_table, plot
from looped_fast.pretrained import load_start
from looped_fast.tasks import task_label
from looped_fast.training import checkpoint, distributed, lock, run_folder
from looped_fast.training.command_line import (
    import_named_tasks,
    option_flags,
    program,
    task_imports,
    task_texts,
)
from looped_fast.training.command_line import parse as parse_flags
from looped_fast.training.config import MODELS, TrainConfig, config_from_dict, saved_config
from looped_fast.training.distributed import resolve_device
from looped_fast.training.log import METRICS_FILE, read_metrics
from looped_fast.training.presets import describe, entry, preset_config
from looped_fast.training.step import Start
from looped_fast.training.trainer import Interrupted, Trainer
from looped_fast.training.trm import command as trm_command


@dataclass(frozen=True)
class Command:
    """Train a looped, standard or weight-tied transformer on a function class.

    The defaults below are those of the preset; choose one with --preset, --task and --model.
    """

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]  # flags without a prefix
    config: Path | None = None
    """YAML file of settings: ours, or an official one."""
    resume: Path | None = None
    """Folder of a run to continue from its latest checkpoint."""
    allow_task_import: bool = False
    """Import the module of a task that a file names (--resume, --config), which runs its code. The
    module that --task names is imported in any case."""


def with_task_flags(base: TrainConfig) -> Any:
    """A ``Command`` with settings ``base`` whose ``options`` are the flags --task.NAME of its task.

    These take the place of ``task_options`` in the settings.
    """
    options = option_flags(base)
    no_flag = tyro.conf.Fixed[tyro.conf.Suppress[dict]]
    settings: Any = _subclass(TrainConfig, task_options=no_flag)
    command: Any = _subclass(
        Command,
        settings=Annotated[settings, tyro.conf.arg(name="")],
        options=Annotated[type(options), tyro.conf.arg(name="task")],
    )
    return command(settings=settings(**_values(base)), options=options)


def _subclass(record: type, **fields: Any) -> type:
    subclass = dataclasses.make_dataclass(
        record.__name__, list(fields.items()), bases=(record,), frozen=True, kw_only=True
    )
    subclass.__doc__ = record.__doc__
    return subclass


def _values(config: TrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = sys.argv[1:] if args is None else args
    logging.basicConfig(format="%(message)s")
    logging.getLogger("looped_fast").setLevel(logging.INFO)  # says when kernels compile
    try:
        with distributed.join() as processes, contextlib.ExitStack() as held:
            with processes.failing_together():  # each of them needs the task's module
                chosen, options = parse_early(args), task_texts(args)
                if chosen.model is not None:
                    check_name("model", chosen.model, (*MODELS, "trm"))
                if trm_command.trains_trm(chosen):
                    return trm_command.main(args, chosen, processes)
                named = [chosen.task]
                if chosen.task == "mixture":
                    named += [options.get("first"), options.get("second")]
                import_named_tasks(*named)
                held.enter_context(task_imports(chosen.allow_task_import))
            return run(*processes.broadcast(lambda: prepare(args, processes, held)), processes)
    except errors.EXPECTED as error:
        return errors.report(error)


def prepare(
    args: list[str], processes: distributed.Processes, held: contextlib.ExitStack
) -> tuple[TrainConfig, str, Path, checkpoint.Checkpoint | None]:
    """Make the arguments of ``run`` from the command line; ``held`` gets the folder's lock."""
    command, origin, resumed = parse(args, processes.world_size, held)
    settings, run_dir = command.settings, command.resume
    if run_dir is None:
        label = f"{task_label(settings.task)}-{settings.model}-{Path(settings.preset).stem}"
        run_dir = run_folder.make_run_dir(label, settings.out, held)
    return settings, origin, run_dir, resumed


def parse_early(args: list[str]) -> argparse.Namespace:
    """The flags on which the defaults of all others depend."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("task", "model", "preset", "device", "window"):
        early.add_argument(f"--{name}")
    for name in ("loops", "dims"):
        early.add_argument(f"--n-{name}", f"--n_{name}")
    for name in ("config", "resume"):
        early.add_argument(f"--{name}", type=Path)
    early.add_argument("--allow-task-import", "--allow_task_import", action="store_true")
    chosen, _ = early.parse_known_args(args)
    return chosen


def parse(
    args: list[str], world_size: int = 1, held: contextlib.ExitStack | None = None
) -> tuple[Command, str, checkpoint.Checkpoint | None]:
    """Parse settings, a phrase that says where they come from, and the checkpoint to resume.

    ``held`` gets the lock of the run to resume, before its latest checkpoint is looked up.
    """
    chosen = parse_early(args)
    # A window that nobody gave is lowered to the loop count, and options of the task must fit the
    # width. Others than numbers are for tyro.
    numbers = {"n_loops": chosen.n_loops, "n_dims": chosen.n_dims}
    if chosen.window is not None:
        del numbers["n_loops"]
    given: dict[str, Any] = {n: int(v) for n, v in numbers.items() if v and v.isdecimal()}
    given["task"] = task_texts(args)
    if chosen.task is not None:
        given["task"]["name"] = chosen.task

    resumed = before = None
    if chosen.resume is not None:
        if held is not None and chosen.resume.is_dir():
            held.enter_context(lock.hold(chosen.resume))
        resumed = run_folder.load_latest(chosen.resume)
        before = saved_config(resumed)
        base = config_from_dict(given, before)
        origin = f"continuing {chosen.resume} from step {resumed.step}"
    else:
        on_gpu = resolve_device(chosen.device or "auto").type != "cpu"
        by_default = "paper" if on_gpu else "small"
        if chosen.config is not None:
            names = ("preset", "model")
            given |= {name: getattr(chosen, name) for name in names if getattr(chosen, name)}
            base, origin = load_config(chosen.config, given, by_default)
        else:
            base = preset_config(
                chosen.preset or by_default, chosen.task or "lr", chosen.model or "looped",
                n_dims=given.get("n_dims"), task_options=task_texts(args),
            )  # fmt: skip
            base = config_from_dict(given, base)
            origin = f"preset {base.preset}"
            if chosen.preset is None:
                origin += f" (the default on a {'GPU' if on_gpu else 'CPU'})"
            if entry(base.task) != base.task:
                origin += f", with the settings of {entry(base.task)}"
    default = with_task_flags(base)
    parsed = parse_flags(type(default), args, program("train"), default)
    options = dataclasses.asdict(parsed.options)
    settings = TrainConfig(**{**_values(parsed.settings), "task_options": options})
    command = Command(settings, parsed.config, parsed.resume, parsed.allow_task_import)
    if resumed is not None and before is not None:
        changes = run_folder.changed_settings(before.to_dict(), command.settings.to_dict())
        n_before = resumed.meta.get("processes", 1)
        if n_before != world_size:
            changes.append(f"processes {n_before} -> {world_size}, and with them the batches")
        origin += f"; changed: {', '.join(changes)}" if changes else ""
        run_folder.check_resume(chosen.resume, resumed, before, command.settings, command.config)
    return command, origin, resumed


def run(
    config: TrainConfig,
    origin: str,
    run_dir: Path,
    resumed: checkpoint.Checkpoint | None,
    processes: distributed.Processes,
) -> int:
    """Train, then report; return the exit status."""
    print(f"looped_fast {VERSION}, task {config.task}, {origin}")
    with processes.failing_together():
        start = None if resumed is not None else _start(config)
        trainer = Trainer(config, run_dir, resumed, processes, start)
    with processes.failing_together():
        announce(trainer)  # its trial steps, too, can fail: nothing is written before
        if processes.is_main:
            run_folder.write_config(config.to_dict(), run_dir)
    started = time.perf_counter()
    try:
        trainer.fit()
    except Interrupted as stop:
        launcher = "python" if processes.world_size == 1 else "torchrun ..."
        with processes.failing_together():
            print(
                f"\n{stop}: step {trainer.step} is finished and saved. Continue with\n"
                f"  {launcher} -m looped_fast.train --resume {run_dir}",
                flush=True,  # torchrun may kill this process next
            )
        return 128 + stop.signum
    minutes = (time.perf_counter() - started) / 60
    summary = f"{trainer.step} steps, {minutes:.1f} minutes in this sitting"
    processes.broadcast(lambda: report(trainer, summary))
    return 0


def _start(config: TrainConfig) -> Start | None:
    """What ``init_from`` names; raises ValueError if it leaves no step to train."""
    if config.init_from is None:
        return None
    start = load_start(config.init_from)
    if start.step >= config.steps:
        raise ValueError(
            f"--init-from {config.init_from} has {start.step} finished steps, which leaves none of "
            f"--steps {config.steps} to train; give more --steps"
        )
    return start


def announce(trainer: Trainer) -> None:
    """Print the settings, backend and estimated time of the run."""
    config, device = trainer.config, trainer.device
    print("\n" + describe(config))
    if measured := trainer.measure_backends():
        print(measured)
    explanation = explain_backend(
        trainer.model, config.batch_size, config.n_points, trainer.precision,
        replayed_training=trainer.graphs.unsupported is None,
    )  # fmt: skip
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters on {hardware}{threads}; {explanation}")
    n_processes = trainer.processes.world_size
    if n_processes > 1:
        total = n_processes * config.batch_size
        print(f"{n_processes} processes, {config.batch_size} prompts each: {total} in a step")
    if config.recompute and explanation.chosen == "cpu":
        print("recompute changes nothing: the cpu backend keeps activations of a prompt per thread")
    if device.type == "cuda":
        without = trainer.graphs.unsupported
        print(f"CUDA graphs: off, {without}" if without else "CUDA graphs: one for each stage")
    minutes = trainer.estimate_seconds() / 60
    time_left = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    preset = trainer.config.preset
    shorter = "--steps N" if preset == "tiny" else "--preset tiny (minutes) or --steps N"
    longer = "" if preset == "paper" else "; the paper's run: --preset paper"
    print(f"estimated time: {time_left}. Shorter: {shorter}{longer}")
    print(f"writing to {trainer.run_dir}\n")
    if trainer.processes.is_main:
        can_write("plots", "TensorBoard events")  # says now what will be left out


def report(trainer: Trainer, summary: str) -> None:
    """Evaluate against the baselines; print a table, write ``results.json`` and a plot."""
    config, task, run_dir = trainer.config, trainer.task, trainer.run_dir
    n_prompts = 5 * config.eval_prompts
    by_loops = trainer.evaluate(n_prompts)
    errors = {f"{config.model}, {n} loops": torch.tensor(e) for n, e in by_loops.items()}
    for name, predict in quick_baselines(task).items():
        batches = evaluation_batches(
            task, n_prompts, config.n_points, seed=config.seed, device=trainer.device
        )
        errors[name] = position_errors(predict, task, batches)
    title = f"{task_label(config.task)}, {config.model}, {config.preset}: {summary}"
    print(f"\n{title}; {n_prompts} held-out prompts\n")
    print(error_table(errors))
    results = {
        "summary": summary,
        "prompts": n_prompts,
        "seed": config.seed,
        "torch": torch.__version__,
        "looped_fast": VERSION,
        "errors": {name: error.tolist() for name, error in errors.items()},
    }
    (run_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print()
    if can_write("plots"):
        plot(run_dir / "report.png", read_metrics(run_dir / METRICS_FILE), errors, title)
        print(f"plot: {run_dir / 'report.png'}")
    print(f"weights: {checkpoint.latest(run_dir)}")


if __name__ == "__main__":
    sys.exit(main())
