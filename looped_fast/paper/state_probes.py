"""Probe the hidden states of a model for X^T y and w_OLS, step by step.

A probe reads one target from the states after one layer or loop step: it averages them over the
prompt's tokens with learned weights, and a two-layer network maps the average to the target. The
paper (arXiv 2311.12424, section 5 and appendix; official ``scripts/model_probe.py``) trains one
module for each step and target: 21 x 41 of them. Here they are the slices of five tensors, trained
by one batched matrix product a layer.

The control is a probe of the same size trained on prompts that share one w (all ones), and tested
on ordinary prompts: it decodes what is known without the prompt.

    python -m looped_fast.state_probes RUN...
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tabulate import tabulate
from torch import Tensor, nn

from looped_fast import errors
from looped_fast.evaluation import evaluation_batches
from looped_fast.evaluation.report import can_write
from looped_fast.model import LoopedTransformer
from looped_fast.ops import reference
from looped_fast.pretrained.provenance import versions
from looped_fast.pretrained.runs import Run, load_run
from looped_fast.tasks import Batch, LinearRegression, sample_batch
from looped_fast.training.command_line import parse, program

HIDDEN = 64  # units of a probe, as in the official code


class StateProbes(nn.Module):
    """One probe for each of ``n_states`` hidden states and each of ``n_targets`` targets.

    Args:
        n_states: L, layers or loop steps that are probed.
        n_targets: K, vectors that each state is probed for.
        seq_len: S, tokens of a prompt.
        n_embd: D, width of a state.
        n_dims: d, width of a target.
    """

    def __init__(self, n_states: int, n_targets: int, seq_len: int, n_embd: int, n_dims: int):
        super().__init__()
        n_probes = n_states * n_targets
        self.token_logits = nn.Parameter(torch.randn(n_states, n_targets, seq_len))
        self.weight_1 = _uniform(n_embd, n_probes, n_embd, HIDDEN)
        self.bias_1 = _uniform(n_embd, n_probes, 1, HIDDEN)
        self.weight_2 = _uniform(HIDDEN, n_probes, HIDDEN, n_dims)
        self.bias_2 = _uniform(HIDDEN, n_probes, 1, n_dims)

    def forward(self, states: Tensor) -> Tensor:
        """Predictions [L, K, B, d] from states [L, B, S, D]."""
        L, B, S, D = states.shape
        tokens_first = states.transpose(1, 2).reshape(L, S, B * D)
        pooled = self.token_logits.softmax(-1) @ tokens_first  # [L, K, B * D]
        pooled = pooled.view(-1, B, D)  # [L * K, B, D]
        hidden = torch.baddbmm(self.bias_1, pooled, self.weight_1).relu()
        return torch.baddbmm(self.bias_2, hidden, self.weight_2).view(
            L, -1, B, self.bias_2.shape[-1]
        )


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """Draw a parameter as ``nn.Linear`` does."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def hidden_states(model: LoopedTransformer, xs: Tensor, ys: Tensor, n_loops: int) -> Tensor:
    """The embedded prompt, then the residual stream after each block: [1 + n_loops * L, B, 2n, D].

    States are those before the final LayerNorm, as in the official code. xs: [B, n, d], ys: [B, n].
    Raises ValueError as in ``model.forward``.
    """
    stack: Any = model._backbone.transformer
    injection = model.config.injection
    embeddings = model.embed(xs, ys)  # [B, 2n, D]
    positions = stack["wpe"].weight[: embeddings.shape[1]]
    state, streams = reference.initial_state(embeddings, injection), [embeddings]
    for _ in range(n_loops):
        x = reference.inject(state, embeddings, injection) + positions
        for block in stack["h"]:
            x = block(x + embeddings if injection == "every_block" else x)
            streams.append(x)
        state = stack["ln_f"](x)
    return torch.stack(streams)


def gradient_targets(xs: Tensor, ys: Tensor) -> Tensor:
    """X^T y of the first i points over n, for i = 1..n: [n, B, d].

    The first gradient-descent step on the squared error, from w = 0, has this direction.
    """
    terms = xs * ys.unsqueeze(-1)  # [B, n, d]
    return terms.cumsum(1).transpose(0, 1) / xs.shape[1]


def least_squares_targets(xs: Tensor, ys: Tensor) -> Tensor:
    """w_OLS of the first i points, of minimum norm, for i = 1..d: [d, B, d].

    Raises:
        ValueError: fewer points than dimensions.
    """
    n, d = xs.shape[1:]
    if n < d:
        raise ValueError(f"{n} points do not determine {d} weights; probe with at least {d} points")
    xs64, ys64 = xs.cpu().double(), ys.cpu().double()
    fits = [
        torch.linalg.lstsq(xs64[:, :i], ys64[:, :i, None], driver="gelsd").solution[..., 0]
        for i in range(1, d + 1)
    ]
    return torch.stack(fits).to(xs)


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "X^T y": gradient_targets,
    "w_OLS": least_squares_targets,
}


@dataclass(frozen=True)
class Settings:
    """How probes are trained. The official code: 1280 prompts, 10,000 to 100,000 steps."""

    n_points: int | None = None
    """In-context points of a prompt, at least n_dims; none: as the model was trained."""
    n_loops: int | None = None
    """Loop steps that are probed; none: as many as the model was trained with."""
    steps: int = 2000
    """Training steps of the probes."""
    batch_size: int = 64
    """Fresh prompts per step."""
    lr: float = 1e-3
    """Adam's learning rate."""
    test_prompts: int = 1280
    """Held-out prompts that the errors are measured on."""
    seed: int = 42
    """Seed of the probes' initial weights, the prompts, and the test."""


def probe(run: Run, settings: Settings, *, control: bool = False) -> dict[str, dict[str, Any]]:
    """Train probes of every target on every hidden state of ``run``, and test them.

    Args:
        run: a model trained on linear regression.
        settings: how the probes are trained and tested.
        control: train on prompts whose w is all ones.

    Returns:
        Target -> ``mse`` (mean squared error over prompts, coordinates and the vectors of the
        target; the official figures show it over d) and ``relative`` (``mse`` over that of
        predicting zero), each a list with one number for the embedded prompt and one for each layer
        or loop step.

    Raises:
        ValueError: a run of another task, fewer points than dimensions or more than the model
            takes, or a count below 1.
    """
    if type(run.task) is not LinearRegression:
        raise ValueError(
            f"{run.name} was trained on {run.config.task!r}; X^T y and w_OLS are probed on a run "
            f"of task 'lr'"
        )
    for name in ("steps", "batch_size", "test_prompts", "n_points", "n_loops"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: at least 1 is needed")
    n_points = run.config.n_points if settings.n_points is None else settings.n_points
    n_loops = run.config.n_loops if settings.n_loops is None else settings.n_loops
    device = next(run.model.parameters()).device

    def observe(batch: Batch, is_control: bool) -> tuple[Tensor, dict[str, Tensor]]:
        xs, ys = batch.xs, batch.xs.sum(-1) if is_control else batch.ys
        with torch.no_grad():
            states = hidden_states(run.model, xs, ys, n_loops)
        return states, {name: target(xs, ys) for name, target in TARGETS.items()}

    def draw(step: int) -> Batch:
        return sample_batch(
            run.task, settings.batch_size, n_points, seed=settings.seed, step=step, device=device
        )

    states, targets = observe(draw(0), control)
    L, _, S, D = states.shape
    torch.manual_seed(settings.seed)
    probes = nn.ModuleDict(
        {
            name: StateProbes(L, len(target), S, D, run.task.n_dims).to(device)
            for name, target in targets.items()
        }
    )
    optimizer = torch.optim.Adam(probes.parameters(), lr=settings.lr)
    for step in range(settings.steps):
        states, targets = observe(draw(step), control)
        # No two probes share parameters, so the sum of their losses trains each by itself.
        loss = sum(
            (probes[name](states) - target).square().mean() for name, target in targets.items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    squares = {name: torch.zeros(L, dtype=torch.float64) for name in TARGETS}
    zero = dict.fromkeys(TARGETS, 0.0)
    for batch in evaluation_batches(
        run.task, settings.test_prompts, n_points, seed=settings.seed, device=device
    ):
        states, targets = observe(batch, False)
        share = len(batch.xs) / settings.test_prompts
        for name, target in targets.items():
            with torch.no_grad():
                errors = (probes[name](states) - target).square()
            squares[name] += share * errors.mean((1, 2, 3)).double().cpu()
            zero[name] += share * target.square().mean().item()
    return {
        name: {"mse": mse.tolist(), "relative": (mse / zero[name]).tolist()}
        for name, mse in squares.items()
    }


@dataclass(frozen=True)
class Command:
    """Probe the hidden states of linear-regression models for X^T y and w_OLS."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs, checkpoints, or names of models shipped with the package."""
    settings: Annotated[Settings, tyro.conf.arg(name="")]  # flags without a prefix
    out: Path = Path("probes")
    """Folder for probes.json and probes.png."""
    device: str = "auto"
    """cpu, cuda, ...; auto: a GPU if there is one."""


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        default = Command((), Settings())
        command = parse(Command, args, program("state_probes"), default)
        if not command.runs:
            raise ValueError("no run to probe; give the folder of one, such as runs/lr-looped-...")
        results = {}
        runs = [load_run(source, command.device) for source in command.runs]
        command.out.mkdir(parents=True, exist_ok=True)  # before the work that it is to hold
        can_write("plots")  # says now what will be left out
        for run in runs:
            print(f"probing {run.name} and its control: {command.settings.steps} steps each")
            results[run.name] = {
                "sha256": run.sha256,
                "probes": probe(run, command.settings),
                "control": probe(run, command.settings, control=True),
            }
    except errors.EXPECTED as error:
        return errors.report(error)
    settings = dataclasses.asdict(command.settings)
    document = {"settings": settings, "versions": versions(), "runs": results}
    (command.out / "probes.json").write_text(json.dumps(document), encoding="utf-8")
    print(f"\n{results_table(results)}\n\nnumbers: {command.out / 'probes.json'}")
    if can_write("plots"):
        plot(command.out / "probes.png", results)
        print(f"plot: {command.out / 'probes.png'}")
    return 0


def results_table(results: dict[str, Any]) -> str:
    """Tabulate each run and target: its best state, and errors before, there and at the end."""
    rows = []
    for name, result in results.items():
        for target in TARGETS:
            errors = result["probes"][target]["relative"]
            best = min(range(len(errors)), key=errors.__getitem__)
            control = min(result["control"][target]["relative"])
            rows.append((name, target, errors[0], best, errors[best], errors[-1], control))
    headers = ["error / zero predictor", "target", "prompt", "best at", "there", "last", "control"]
    return tabulate(rows, headers, floatfmt=".3f")


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plot probe error by layer or loop step, a panel per target; dashed: the best control."""
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(TARGETS)), TARGETS, strict=True):
        for name, result in results.items():
            errors = result["probes"][target]["relative"]
            (line,) = axes.plot(errors, "o-", markersize=4, label=name)
            control = min(result["control"][target]["relative"])
            axes.axhline(control, linestyle="--", color=line.get_color())
        axes.set(title=f"probes of {target}", xlabel="layer or loop step", ylim=(0, None))
        axes.set_ylabel("squared error / zero predictor")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)
