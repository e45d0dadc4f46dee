"""The picture of a run on puzzles: its training, its loops, and a Sudoku solved cycle by cycle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from looped_fast.evaluation.puzzles import Accuracy, answers_by_cycle
from looped_fast.model import TinyRecursiveModel
from looped_fast.tasks.sudoku import BLANK, PuzzleBatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # side of a grid -> shape of its boxes
_PANELS = 7  # grids in a row
_SEARCHED = 64  # puzzles of which the slowest is drawn


def save_report(
    path: Path,
    history: list[dict[str, Any]],
    accuracy: Accuracy,
    model: TinyRecursiveModel,
    puzzles: PuzzleBatch,
    title: str,
) -> None:
    """Draw a run into ``path`` (PNG): without the grids if the puzzles are no Sudoku.

    Args:
        path: the file.
        history: lines of ``metrics.jsonl``.
        accuracy: that of the trained model.
        model: the trained model.
        puzzles: held-out ones, [B, S]; of the first 64, the one that takes most cycles is drawn.
        title: heading of the figure.
    """
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    side = _sudoku_side(model)
    figure = Figure(figsize=(12, 4 if side is None else 6.4), layout="constrained")
    rows: Any = [figure] if side is None else figure.subfigures(2, 1, height_ratios=(3, 2))
    training, steps = rows[0].subplots(1, 2)
    for name, label in (("solved", "training, as they halt"), ("eval_solved", "held out")):
        lines = [line for line in history if name in line]
        training.plot([x["step"] for x in lines], [x[name] for x in lines], label=label)
    training.set(xlabel="training step", ylabel="puzzles solved", ylim=(0, 1.02))
    training.legend(fontsize="small")
    counts = range(1, len(accuracy.solved_after) + 1)
    steps.plot(counts, accuracy.solved_after, marker="o", label="held out")
    steps.axvline(accuracy.steps_by_q, color="k", ls=":", label="mean steps, halting by q")
    steps.set(xlabel="supervision steps", ylabel="puzzles solved", ylim=(0, 1.02))
    steps.legend(fontsize="small")
    for axes in (training, steps):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    if side is not None:
        grids = rows[1].subplots(1, _PANELS)
        some = PuzzleBatch(*(tokens[:_SEARCHED] for tokens in puzzles))
        _draw_cycles(list(grids), side, some, answers_by_cycle(model, some.inputs))
    figure.savefig(path, dpi=120)


def _sudoku_side(model: TinyRecursiveModel) -> int | None:
    """Digits in a row if the model's puzzles are Sudoku of a known size, else None."""
    sizes = model.config.seq_len, model.config.vocab_size
    return next((n for n in _BOXES if sizes == (n * n, n + 2)), None)


def slowest(answers: Tensor, labels: Tensor) -> tuple[int, int]:
    """The puzzle that takes most cycles to be solved for good, and how many.

    Without any, it is the one with the most cells right in the end, after all cycles.

    Args:
        answers: after each cycle, [C, B, S].
        labels: solutions [B, S].
    """
    right = answers == labels
    # Cycles after which some cell is wrong, counted from the end: C minus those solved for good.
    n_solved = right.all(-1).flip(0).int().cumprod(0).sum(0)  # [B]
    if not n_solved.any():
        return int(right[-1].sum(-1).argmax()), len(answers)
    ends = torch.where(n_solved > 0, len(answers) - n_solved + 1, 0)
    return int(ends.argmax()), int(ends.max())


def _draw_cycles(panels: list[Axes], side: int, puzzles: PuzzleBatch, answers: Tensor) -> None:
    """Draw a puzzle's grid, and its answers after the cycles that changed it."""
    which, n_cycles = slowest(answers, puzzles.labels)
    given, solution = puzzles.inputs[which], puzzles.labels[which]
    shown = [("given", given)]
    for cycle, answer in enumerate(answers[:n_cycles, which], 1):
        if not torch.equal(answer, shown[-1][1]):
            shown.append((f"after {cycle} cycle{'s' * (cycle > 1)}", answer))
    if len(shown) > len(panels):  # the first ones, and the last
        shown = [*shown[: len(panels) - 1], shown[-1]]
    for axes in panels:
        axes.set_axis_off()
    for axes, (title, tokens) in zip(panels, shown, strict=False):
        axes.set_title(title, fontsize="small")
        axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
        for line in range(side + 1):
            rows, columns = _BOXES[side]
            axes.axhline(line, color="k", lw=1.6 if line % rows == 0 else 0.4)
            axes.axvline(line, color="k", lw=1.6 if line % columns == 0 else 0.4)
        for cell, token in enumerate(tokens.tolist()):
            if token <= BLANK:
                continue
            is_given, is_right = given[cell] > BLANK, solution[cell] == token
            color = "tab:red" if not is_right else "k" if is_given else "tab:blue"
            row, column = divmod(cell, side)
            axes.text(
                column + 0.5, row + 0.5, str(token - 1), color=color, ha="center", va="center",
                weight="bold" if is_given else "normal",
            )  # fmt: skip
