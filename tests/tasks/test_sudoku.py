"""Sudoku: every grid is valid, every puzzle has one solution, and unseen grids are unseen."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from looped_fast.tasks import sudoku
from looped_fast.tasks.puzzles import PUZZLES
from looped_fast.tasks.sudoku import BLANK, Sudoku, canonical_grids, deduce

ALL = pytest.mark.parametrize("name", list(PUZZLES))
SEED = 3


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(sudoku, "_TRAINING_POOL", 256)
    sudoku._training_pool.cache_clear()
    yield
    sudoku._training_pool.cache_clear()


def canonical(task: Sudoku, grids: torch.Tensor) -> torch.Tensor:
    """Grids of digits 1..n with their digits renamed so that the first row is 1 2 ... n."""
    names = torch.zeros(len(grids), task.side + 1, dtype=torch.int64)
    names.scatter_(1, grids[:, : task.side], torch.arange(1, task.side + 1).expand(len(grids), -1))
    return names.gather(1, grids)


def units(task: Sudoku) -> list[list[int]]:
    """Cells of each row, column and box, by definition."""
    n, rows, columns = task.side, task.box_rows, task.box_columns
    lines = [[r * n + c for c in range(n)] for r in range(n)]
    boxes = [
        [(top + r) * n + left + c for r in range(rows) for c in range(columns)]
        for top in range(0, n, rows)
        for left in range(0, n, columns)
    ]
    return [*lines, *map(list, zip(*lines, strict=True)), *boxes]


@functools.cache
def peers(task: Sudoku) -> list[set[int]]:
    """Cells in a unit with each cell."""
    cells = range(task.seq_len)
    return [{peer for unit in units(task) if cell in unit for peer in unit} for cell in cells]


def n_solutions(task: Sudoku, puzzle: list[int]) -> int:
    """Count solutions of a puzzle (0 is an empty cell) by trying every digit everywhere."""
    peers = [
        {p for unit in units(task) if cell in unit for p in unit} for cell in range(len(puzzle))
    ]

    def open_digits(cell):
        return set(range(1, task.side + 1)) - {puzzle[p] for p in peers[cell]}

    empty = [cell for cell, digit in enumerate(puzzle) if not digit]
    if not empty:
        return 1
    cell = min(empty, key=lambda c: len(open_digits(c)))
    count = 0
    for digit in open_digits(cell):
        puzzle[cell] = digit
        count += n_solutions(task, puzzle)
        puzzle[cell] = 0
    return count


@pytest.mark.parametrize(("name", "n_grids"), [("sudoku4", 288), ("sudoku6", 28_200_960)])
def test_all_grids_are_known(name, n_grids):
    """288 and 28,200,960 grids are known to exist (Wikipedia, Mathematics of Sudoku)."""
    task = PUZZLES[name]
    grids = torch.cat([canonical_grids(task, held_out=held_out) for held_out in (True, False)])
    assert len(grids) * math.factorial(task.side) == n_grids
    assert len(torch.unique(grids, dim=0)) == len(grids)
    digits = torch.arange(1, task.side + 1)
    for unit in units(task):
        assert (grids[:, unit].sort(1).values == digits).all()
    assert (grids[:, : task.side] == digits).all()


@ALL
def test_every_puzzle_has_one_solution(name):
    task = PUZZLES[name]
    for batch in (task.training_batch(20, SEED, 5), task.evaluation_batch(20, SEED)):
        for puzzle, solution in zip(batch.inputs - 1, batch.labels - 1, strict=True):
            assert n_solutions(task, puzzle.tolist()) == 1
            assert torch.equal(deduce(task, puzzle[None])[0], solution)


def test_a_puzzle_with_two_solutions_is_seen_by_the_check():
    task = PUZZLES["sudoku4"]
    grid = canonical_grids(task, held_out=False)[0]
    assert n_solutions(task, [0] * 16) == 288
    assert not deduce(task, torch.zeros_like(grid)[None]).any()


@ALL
def test_some_puzzles_have_no_given_too_many(name):
    """Without what is given back, no cell more can be emptied."""
    task = Sudoku(PUZZLES[name].box_rows, PUZZLES[name].box_columns, given_back=0)
    grids = canonical_grids(task, held_out=True)[:2]
    for puzzle in task.make_puzzles(grids, torch.Generator().manual_seed(0)):
        for cell in puzzle.nonzero():
            fewer = puzzle.clone()
            fewer[cell] = 0
            assert (deduce(task, fewer[None]) == 0).any()


@ALL
def test_the_number_of_cells_given_back_is_drawn(name):
    task = PUZZLES[name]
    grids = canonical_grids(task, held_out=True)[:1].expand(400, -1)
    fewest = Sudoku(task.box_rows, task.box_columns, 0)
    counts = [
        (t.make_puzzles(grids, torch.Generator().manual_seed(1)) > 0).sum(1) for t in (fewest, task)
    ]
    back = counts[1] - counts[0]
    assert torch.unique(back).tolist() == list(range(task.given_back + 1))
    assert abs(back.double().mean() - task.given_back / 2) < 0.5


@ALL
def test_inputs_are_the_solution_with_cells_emptied(name):
    task = PUZZLES[name]
    inputs, labels = task.training_batch(64, SEED, 0)
    assert inputs.shape == labels.shape == (64, task.seq_len)
    assert inputs.dtype == labels.dtype == torch.int64
    assert ((inputs == labels) | (inputs == BLANK)).all()
    assert (inputs == BLANK).any(1).all()
    assert (labels.min(), labels.max()) == (BLANK + 1, task.vocab_size - 1)


@ALL
def test_no_renaming_of_an_evaluated_grid_is_trained_on(name):
    task = PUZZLES[name]
    trained = torch.cat(
        [task.training_batch(512, seed, step).labels for seed in (0, 1) for step in (0, 1)]
    )
    unseen = task.evaluation_batch(512, SEED).labels
    sets = [{tuple(g) for g in canonical(task, t - 1).tolist()} for t in (trained, unseen)]
    assert sets[0].isdisjoint(sets[1])
    for held_out, found in ((False, sets[0]), (True, sets[1])):
        assert found <= {tuple(g) for g in canonical_grids(task, held_out=held_out).tolist()}


@pytest.mark.parametrize(("name", "n_held_out"), [("sudoku4", 2), ("sudoku6", 6528)])
def test_a_sixth_of_the_canonical_grids_is_held_out(name, n_held_out):
    task = PUZZLES[name]
    assert len(canonical_grids(task, held_out=True)) == n_held_out
    assert len(canonical_grids(task, held_out=False)) == 5 * n_held_out


@ALL
def test_batches_are_a_pure_function_of_seed_step_and_rank(name):
    task = PUZZLES[name]
    first = task.training_batch(8, SEED, 4, 1)
    torch.rand(3)
    sudoku._training_pool.cache_clear()
    again = task.training_batch(8, SEED, 4, 1)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    others = [
        task.training_batch(8, *key) for key in ((SEED, 4, 0), (SEED, 5, 1), (SEED + 1, 4, 1))
    ]
    for one, other in itertools.combinations([first, *others], 2):
        assert not torch.equal(one.inputs, other.inputs)
    held = [task.evaluation_batch(8, seed).inputs for seed in (0, 0, 1)]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])
