"""Make a folder of ``looped_fast/pretrained`` from a finished run.

    python -m looped_fast.pretrained runs/lr --cpu-minutes 9.5 --how "One thread of ..."

It holds the weights, their errors on held-out prompts, and a card that says how they were made.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from looped_fast import errors, pretrained
from looped_fast.evaluation import model_errors
from looped_fast.model import LoopedTransformer
from looped_fast.tasks import task_label
from looped_fast.training import checkpoint
from looped_fast.training.command_line import Parser, program, task_imports
from looped_fast.training.config import TrainConfig, saved_config
from looped_fast.training.log import METRICS_FILE, read_metrics
from looped_fast.training.presets import entry, preset_config
from looped_fast.training.task_settings import flat

_PROMPTS = 1280  # held out for the evaluation, as in the paper


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(program("pretrained"), description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--cpu-minutes", type=float, required=True, help="processor time it took")
    parser.add_argument("--how", required=True, help="machine, threads, sittings: in sentences")
    parser.add_argument("--name", help="of the folder (default: by task, model and preset)")
    parser.add_argument(
        "--allow-task-import", action="store_true", help="import the module of the run's own task"
    )
    options = parser.parse_args(args)
    try:
        with task_imports(options.allow_task_import):
            folder = release(options.run, options.cpu_minutes, options.how, name=options.name)
    except errors.EXPECTED as error:
        return errors.report(error)
    print((folder / "README.md").read_text(encoding="utf-8"))
    return 0


def release(
    run: Path, cpu_minutes: float, how: str, to: Path | None = None, name: str | None = None
) -> Path:
    """Write weights and card of ``run``; return their folder, in ``to`` or this package.

    Its ``name`` is by default ``<task>-<preset>``, with the model before the preset unless looped.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: the run is not finished, or its task's module is not imported.
        CheckpointError: the checkpoint is damaged.
    """
    latest = checkpoint.latest(run)
    if latest is None:
        raise FileNotFoundError(f"{run} holds no checkpoint; give the folder of a finished run")
    source = checkpoint.load(latest)
    config = dataclasses.replace(saved_config(source), out=None)
    if source.step < config.steps:
        raise ValueError(
            f"{run} stopped at step {source.step} of {config.steps}; finish it with "
            f"python -m looped_fast.train --resume {run}"
        )
    kind = [] if config.model == "looped" else [config.model]
    name = name or "-".join([task_label(config.task), *kind, config.preset])
    folder = (to or Path(pretrained.__file__).parent) / name
    meta = {
        "minutes": round(_minutes(read_metrics(run / METRICS_FILE)), 1),
        "cpu_minutes": cpu_minutes,
        "how": how,
        "curve": _curve(config, read_metrics(run / METRICS_FILE)),
        "prompts": _PROMPTS,
        "errors": _errors(source, config),
    }
    checkpoint.export_weights(source, folder, config=config.to_dict(), meta=meta)
    (folder / "README.md").write_text(card(folder), encoding="utf-8")
    return folder


def card(folder: Path) -> str:
    """The model card of ``folder``, from what ``release`` recorded there."""
    weights = checkpoint.load(folder)
    config, meta = saved_config(weights), weights.meta
    size = sum(tensor.numel() for tensor in weights.model_state.values())
    errors = meta["errors"]
    half, last = config.n_points // 2, config.n_points - 1
    rows = [(loops, by_position[half], by_position[-1]) for loops, by_position in errors.items()]
    table = tabulate(
        rows,
        ("loops", f"after {half} examples", f"after {last}"),
        tablefmt="github",
        floatfmt=("", ".4f", ".4f"),
    )
    curve = tabulate(
        meta["curve"],
        ("step", "minutes", f"error after {last} examples"),
        tablefmt="github",
        floatfmt=("", ".1f", ".4f"),
    )
    return f"""# {folder.name}

A {config.model} transformer that has learned to predict `{config.make_task()}` from examples in its
prompt, {config.n_points} points long: {size:,} parameters, D = {config.n_embd}, \
{config.n_head} heads, {config.n_layer} layer{"s" * (config.n_layer > 1)}, b = {config.n_loops}, \
T = {config.window}.

```python
model = looped_fast.from_pretrained("{folder.name}")
```

Squared error / variance on {meta["prompts"]} held-out prompts (evaluation seed {config.seed}):

{table}

## How it was made

```sh
{shlex.join(command(config))}
```

Seed {config.seed}, {weights.step} steps of {config.batch_size} prompts: {meta["minutes"]} minutes \
by the clock, {meta["cpu_minutes"]} minutes of processor time.
{meta["how"]} Every setting is in `{checkpoint.INDEX}`.

Error on {config.eval_prompts} held-out prompts while it trained:

{curve}
"""


def command(config: TrainConfig) -> list[str]:
    """The command that repeats a run: its preset, and flags for settings that differ."""
    known = flat(preset_config(config.preset, entry(config.task), config.model).to_dict())
    words = ["python", "-m", "looped_fast.train", "--preset", config.preset]
    words += ["--task", config.task, "--model", config.model]
    for name, value in flat(config.to_dict()).items():
        if name == "task" or (name in known and value == known[name]):
            continue
        section, dot, leaf = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{section}{dot}{'' if value else 'no-'}{leaf}")
        else:
            words += [f"--{section}{dot}{leaf}", str(value)]
    return words


def _errors(source: checkpoint.Checkpoint, config: TrainConfig) -> dict[str, list[float]]:
    """Relative error by position, {loop count: [n]}; up to 10 b loops if looped."""
    model = LoopedTransformer(config.model_config())
    checkpoint.restore_into(source, model)
    b = config.n_loops
    counts = [config.window, b, 2 * b, 10 * b] if config.model == "looped" else [b]
    errors = model_errors(
        model, config.make_task(), counts, _PROMPTS, config.n_points, seed=config.seed
    )
    return {str(n_loops): error.tolist() for n_loops, error in errors.items()}


def _minutes(history: list[dict[str, Any]], up_to: float = torch.inf) -> float:
    """Minutes of training until step ``up_to``, evaluations and checkpoints included."""
    seconds, previous = 0.0, 0
    for line in history:
        if "steps_per_s" in line and line["step"] <= up_to:
            seconds += (line["step"] - previous) / line["steps_per_s"]
            previous = line["step"]
    return seconds / 60


def _curve(config: TrainConfig, history: list[dict[str, Any]]) -> list[list[float]]:
    """Rows of step, minutes, and error at the last position after b loops."""
    return [
        [line["step"], _minutes(history, line["step"]), line["errors"][str(config.n_loops)][-1]]
        for line in history
        if "errors" in line
    ]


if __name__ == "__main__":
    sys.exit(main())
