"""Accuracy of models on puzzles, with and without halting, and the picture of a puzzle."""

from __future__ import annotations

import pytest
import torch

from looped_fast.evaluation import puzzle_figures
from looped_fast.evaluation.puzzle_figures import save_report, slowest
from looped_fast.evaluation.puzzles import (
    Accuracy,
    accuracy_table,
    answers_by_cycle,
    solve_steps,
)
from looped_fast.model import Carry, TinyRecursiveModel, TRMConfig, TRMOutput
from looped_fast.tasks.puzzles import PUZZLES
from looped_fast.tasks.sudoku import PuzzleBatch

SIZES = {"hidden_size": 32, "num_heads": 2, "L_layers": 1, "L_cycles": 1, "halt_max_steps": 3}


def model(task="sudoku4", **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": PUZZLES[task].vocab_size, "seq_len": PUZZLES[task].seq_len}
    return TinyRecursiveModel(TRMConfig(**shape | SIZES | changes), "reference")


class Scripted(TinyRecursiveModel):
    """Answers and logits of halting are scripted, by step and puzzle."""

    def __init__(self, answers, q_halt):
        steps, _, seq_len = answers.shape
        super().__init__(
            TRMConfig(vocab_size=4, seq_len=seq_len, **SIZES | {"halt_max_steps": steps})
        )
        self.answers, self.q = answers, q_halt

    def forward(self, inputs, carry=None, puzzle_identifiers=None):
        step = 0 if carry is None else int(carry.z_H)
        logits = torch.nn.functional.one_hot(self.answers[step], 4).float()
        carry = Carry(torch.tensor(step + 1), torch.tensor(0))
        return TRMOutput(carry, logits, self.q[step], self.q[step])


def test_accuracy_counts_cells_puzzles_and_steps():
    labels = torch.tensor([[1, 2], [3, 1], [2, 0]])  # 0 is padding: no answer is asked for
    answers = torch.tensor(
        [
            [[1, 2], [3, 3], [1, 1]],
            [[1, 1], [3, 1], [2, 1]],
            [[1, 2], [3, 1], [1, 3]],
        ]
    )
    q_halt = torch.tensor([[-1.0, 1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    found = solve_steps(Scripted(answers, q_halt), PuzzleBatch(labels, labels))
    assert found.cells == 4 / 5
    assert found.solved == pytest.approx(2 / 3)
    assert found.solved_after == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert found.steps_by_q == pytest.approx((2 + 1 + 2) / 3)
    assert found.solved_by_q == pytest.approx(1 / 3)  # the third alone halts on a right answer


def test_a_puzzle_whose_q_stays_low_takes_every_step():
    answers = torch.ones(4, 2, 2, dtype=torch.int64)
    found = solve_steps(Scripted(answers, torch.full((4, 2), -1.0)), PuzzleBatch(*answers[:2]))
    assert (found.steps_by_q, found.solved_by_q) == (4, 1)


def test_puzzles_are_solved_in_chunks(monkeypatch):
    puzzles = PUZZLES["sudoku4"].evaluation_batch(7, 0)
    whole = solve_steps(model(), puzzles)
    monkeypatch.setattr("looped_fast.evaluation.puzzles._CHUNK", 3)
    assert solve_steps(model(), puzzles) == whole


def test_accuracy_is_that_of_solve():
    puzzles, net = PUZZLES["sudoku4"].evaluation_batch(40, 0), model()
    net.q_head.weight.data.normal_()
    net.q_head.bias.data[0] -= net(puzzles.inputs).q_halt.median()  # half of them halt at once
    found = solve_steps(net, puzzles)
    for halt, steps in (("never", 3), ("q", found.steps_by_q)):
        solution = net.solve(puzzles.inputs, halt=halt)
        assert solution.n_steps.double().mean().item() == pytest.approx(steps)
    assert 1 < found.steps_by_q < 3
    right = net.solve(puzzles.inputs).tokens == puzzles.labels
    assert found.cells == pytest.approx(right.double().mean().item())


@pytest.mark.parametrize(
    "changes", [{}, {"pos_encodings": "learned"}, {"puzzle_emb_ndim": 8}], ids=str
)
def test_the_last_cycle_of_a_step_gives_its_answer(changes):
    net = model(H_cycles=2, **changes)
    inputs = PUZZLES["sudoku4"].evaluation_batch(5, 0).inputs
    answers = answers_by_cycle(net, inputs)
    assert answers.shape == (6, 5, 16)
    for n_steps in (1, 2, 3):
        ids = torch.zeros(5, dtype=torch.int64)
        tokens = net.solve(inputs, max_steps=n_steps, puzzle_identifiers=ids).tokens
        assert torch.equal(answers[2 * n_steps - 1], tokens)


def test_the_slowest_puzzle_is_found():
    labels = torch.tensor([[1, 1], [2, 2], [3, 3], [1, 2]])
    answers = torch.tensor(
        [
            [[1, 1], [2, 1], [3, 3], [0, 2]],
            [[1, 1], [2, 2], [0, 3], [0, 2]],
            [[1, 1], [2, 2], [3, 3], [0, 2]],
            [[1, 1], [2, 2], [3, 3], [0, 0]],
        ]
    )
    assert slowest(answers, labels) == (2, 3)  # it was right before, but not for good
    assert slowest(answers[:, :2], labels[:2]) == (1, 2)
    assert slowest(answers[:, :1], labels[:1]) == (0, 1)
    assert slowest(answers[:, 3:], labels[3:]) == (0, 4)  # never solved: all cycles


def test_wrong_digits_are_red_and_given_ones_bold(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    drawn = []
    text = Axes.text

    def spy(axes, x, y, digit, **style):
        drawn.append(
            (axes.get_title(), int(y) * 4 + int(x), int(digit), style["color"], style["weight"])
        )
        return text(axes, x, y, digit, **style)

    monkeypatch.setattr(Axes, "text", spy)
    inputs, labels = PUZZLES["sudoku4"].evaluation_batch(1, 0)
    wrong = labels.clone()
    cell = int((inputs[0] == 1).nonzero()[0])
    wrong[0, cell] = wrong[0, cell] % 4 + 2
    monkeypatch.setattr(
        puzzle_figures, "answers_by_cycle", lambda model, inputs: torch.stack([wrong, labels])
    )
    accuracy = Accuracy(0.5, 0.5, 0.5, 1.0, [0.5, 0.5, 0.5])
    path = tmp_path / "report.png"
    save_report(path, [], accuracy, model(), PuzzleBatch(inputs, labels), "title")
    assert path.stat().st_size > 10_000
    panels = {title for title, *_ in drawn}
    assert panels == {"given", "after 1 cycle", "after 2 cycles"}
    n_given = int((inputs > 1).sum())
    assert sum(title == "given" for title, *_ in drawn) == n_given
    assert sum(weight == "bold" for *_, weight in drawn) == 3 * n_given
    red = [entry for entry in drawn if entry[3] == "tab:red"]
    assert [(title, where) for title, where, *_ in red] == [("after 1 cycle", cell)]


def test_puzzles_that_are_no_sudoku_have_no_grids(tmp_path):
    net = TinyRecursiveModel(TRMConfig(vocab_size=7, seq_len=10, **SIZES), "reference")
    tokens = torch.ones(2, 10, dtype=torch.int64)
    accuracy = Accuracy(0.5, 0.5, 0.5, 1.0, [0.5])
    save_report(tmp_path / "a.png", [], accuracy, net, PuzzleBatch(tokens, tokens), "title")
    assert (tmp_path / "a.png").exists()


def test_the_table_has_a_row_for_each_run():
    table = accuracy_table({"one": Accuracy(0.98765, 0.5, 0.25, 1.5, [0.5])})
    assert table.splitlines()[-1].split() == ["one", "98.77%", "50.00%", "25.00%", "1.50"]
