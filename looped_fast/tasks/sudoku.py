"""Sudoku of 4x4 and 6x6 cells: puzzles with exactly one solution, drawn from a seed.

Every grid is one of ``canonical_grids``, whose first row is 1 2 ... n, with its digits renamed. A
sixth of the canonical grids is held out: no renaming of an evaluation's grid occurs in training.

A puzzle is made from a grid by emptying its cells in random order. A cell stays empty if deduction
alone (``deduce``) still fills the grid, which proves that there is one solution. In the end no cell
more can be emptied. Some of the cells are then given back, so that puzzles differ in difficulty.

Source of the tokens: ``dataset/build_sudoku_dataset.py`` of TinyRecursiveModels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from looped_fast.tasks.sampling import EVALUATION, batch_generator

PADDING, BLANK = 0, 1  # tokens; BLANK is an empty cell, and digit d is d + 1
_TRAINING_POOL = 4096  # puzzles, each of which stands for the n! renamings of its digits
_POOL = -4  # random stream of the training pool; those of batches are ranks, from 0


class PuzzleBatch(NamedTuple):
    """Puzzles and their solutions as tokens [B, S], int64."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Sudoku:
    """Puzzles on n x n cells, n = box_rows * box_columns, in boxes of that shape.

    Attributes:
        box_rows, box_columns: shape of a box.
        given_back: largest number of cells that are given beyond those that a puzzle needs.
    """

    box_rows: int
    box_columns: int
    given_back: int

    @property
    def side(self) -> int:
        """Cells in a row, n, and digits."""
        return self.box_rows * self.box_columns

    @property
    def seq_len(self) -> int:
        """Cells S = n^2."""
        return self.side**2

    @property
    def vocab_size(self) -> int:
        """Tokens: padding, the empty cell and n digits."""
        return self.side + 2

    def training_batch(self, batch_size: int, seed: int, step: int, rank: int = 0) -> PuzzleBatch:
        """Draw the training batch of (seed, step, rank), on the CPU."""
        generator = batch_generator(seed, step, rank, "cpu")
        puzzles, grids = _training_pool(self, seed)
        rows = torch.randint(len(grids), (batch_size,), generator=generator)
        return self._renamed(puzzles[rows], grids[rows], generator)

    def evaluation_batch(self, n_puzzles: int, seed: int) -> PuzzleBatch:
        """Draw puzzles of held-out grids, on the CPU; a pure function of (n_puzzles, seed)."""
        generator = batch_generator(seed, 0, EVALUATION, "cpu")
        grids = canonical_grids(self, held_out=True)
        rows = torch.randint(len(grids), (n_puzzles,), generator=generator)
        puzzles = self.make_puzzles(grids[rows], generator)
        return self._renamed(puzzles, grids[rows], generator)

    def make_puzzles(self, grids: Tensor, generator: Generator) -> Tensor:
        """Empty cells of grids [B, S] (digits 1..n) in random order; 0 is an empty cell."""
        puzzles = grids.clone()
        rows = torch.arange(len(grids))
        order = torch.rand(grids.shape, generator=generator).argsort(1)
        for cells in order.T:
            without = puzzles.clone()
            without[rows, cells] = 0
            unique = (deduce(self, without) > 0).all(1)
            puzzles[unique] = without[unique]
        # Give back the cells that were emptied last, up to a random number of them.
        count = torch.randint(self.given_back + 1, (len(grids), 1), generator=generator)
        emptied = (puzzles == 0).gather(1, order).flip(1)  # [B, S], last first
        again = (emptied & (emptied.cumsum(1) <= count)).flip(1)
        return torch.where(torch.zeros_like(again).scatter(1, order, again), grids, puzzles)

    def _renamed(self, puzzles: Tensor, grids: Tensor, generator: Generator) -> PuzzleBatch:
        """Tokens of puzzles [B, S] and their grids, with the digits of each renamed at random."""
        names = 1 + torch.rand((len(grids), self.side), generator=generator).argsort(1)
        tokens = 1 + torch.nn.functional.pad(names, (1, 0))  # that of 0 is BLANK
        return PuzzleBatch(tokens.gather(1, puzzles), tokens.gather(1, grids))


def deduce(task: Sudoku, puzzles: Tensor) -> Tensor:
    """Fill the cells [B, S] (0 is empty) that follow by two rules, until none does.

    A cell takes a digit if it is the only one left for the cell, or if the cell is the only one
    left for the digit in a row, column or box. If a puzzle has a solution and all its cells get
    filled, it has no other.
    """
    units = _units(task)  # [3n, S]
    peers = ((units.T @ units) > 0).float().fill_diagonal_(0)  # [S, S]
    digits = torch.arange(1, task.side + 1)
    given = puzzles.T.unsqueeze(-1)  # [S, B, 1]
    open_ = ((given == 0) | (given == digits)).float()  # [S, B, n]: digits left for each cell
    n_open = open_.sum()
    while True:
        placed = open_ * (open_.sum(-1, keepdim=True) == 1)
        open_ *= _times(peers, placed) == 0
        only = (_times(units, open_) == 1).float()  # [3n, B, n]
        here = open_ * (_times(units.T, only) > 0)
        open_ = torch.where(here.sum(-1, keepdim=True) > 0, here, open_)
        before, n_open = n_open, open_.sum()
        if n_open == before:
            break
    known = open_.sum(-1) == 1
    return torch.where(known, (open_ * digits).sum(-1).long(), 0).T


def canonical_grids(task: Sudoku, *, held_out: bool) -> Tensor:
    """The grids [N, S] whose first row is 1 2 ... n: those held out, or all others.

    >>> [len(canonical_grids(Sudoku(2, 2, 0), held_out=held_out)) for held_out in (True, False)]
    [2, 10]
    """
    grids = _all_canonical(task)
    # Multiples of the golden ratio: about every sixth grid, evenly spread, and not every sixth row
    # of a pattern.
    position = torch.arange(len(grids)) * 2654435761 % 2**32
    return grids[(position < 2**32 // 6) == held_out]


@functools.cache
def _all_canonical(task: Sudoku) -> Tensor:
    n = task.side
    rows = torch.tensor(list(permutations(range(n))))  # [n!, n]
    bits = 1 << rows
    column_box = torch.arange(n) // task.box_columns
    boxes = torch.stack([bits[:, column_box == box].sum(1) for box in range(n // task.box_columns)])
    box_bits = boxes.T[:, column_box]  # [n!, n]: digits of the row in the box of each column
    grids = torch.arange(n).view(1, 1, n)
    columns, band = bits[:1], box_bits[:1]  # digits in each column, and in its box
    for row in range(1, n):
        if row % task.box_rows == 0:
            band = torch.zeros_like(band)
        fits = ((columns | band)[:, None] & bits == 0).all(-1)
        grid, next_row = fits.nonzero(as_tuple=True)
        grids = torch.cat((grids[grid], rows[next_row, None]), 1)
        columns, band = columns[grid] | bits[next_row], band[grid] | box_bits[next_row]
    return grids.flatten(1) + 1


@functools.cache
def _units(task: Sudoku) -> Tensor:
    """Rows, columns and boxes as masks [3n, S], float32: each holds every digit once."""
    cells = torch.arange(task.seq_len)
    row, column = cells // task.side, cells % task.side
    box = row // task.box_rows * task.box_rows + column // task.box_columns
    groups = [group == i for group in (row, column, box) for i in range(task.side)]
    return torch.stack(groups).float()


def _times(matrix: Tensor, tensor: Tensor) -> Tensor:
    """Multiply [R, S] by [S, B, n], as one product of matrices."""
    return (matrix @ tensor.flatten(1)).view(-1, *tensor.shape[1:])


@functools.lru_cache(maxsize=4)
def _training_pool(task: Sudoku, seed: int) -> tuple[Tensor, Tensor]:
    """Puzzles [N, S] and their grids, drawn from the grids that are not held out."""
    generator = batch_generator(seed, 0, _POOL, "cpu")
    grids = canonical_grids(task, held_out=False)
    chosen = grids[torch.randint(len(grids), (_TRAINING_POOL,), generator=generator)]
    return task.make_puzzles(chosen, generator), chosen
