"""Puzzles by name: those made here, and data sets of the TRM public code by their folder."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from looped_fast.errors import read_json, unknown_name
from looped_fast.tasks.sampling import EVALUATION, batch_generator
from looped_fast.tasks.sudoku import PuzzleBatch, Sudoku

PUZZLES = {"sudoku4": Sudoku(2, 2, given_back=4), "sudoku6": Sudoku(2, 3, given_back=8)}
_INDEX = Path("train") / "dataset.json"


class PuzzleTask(Protocol):
    """Puzzles to train on, and others to evaluate on; ``Sudoku`` is one.

    Token 0 is padding: where a solution has it, no answer is asked for.
    """

    @property
    def seq_len(self) -> int:
        """Tokens S of a puzzle."""

    @property
    def vocab_size(self) -> int:
        """Tokens are below this number."""

    def training_batch(self, batch_size: int, seed: int, step: int) -> PuzzleBatch:
        """Puzzles of a training step, [B, S] on the CPU: a pure function of its arguments."""

    def evaluation_batch(self, n_puzzles: int, seed: int) -> PuzzleBatch:
        """Puzzles that are not trained on: a pure function of its arguments."""


@dataclass(frozen=True)
class PuzzleFiles:
    """A data set that a ``dataset/build_*.py`` of the TRM public code wrote.

    Of a folder's ``train`` and ``test``, ``dataset.json`` and ``all__inputs.npy`` and
    ``all__labels.npy`` ([N, S] integers) are read.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, the two parts do not fit, or the puzzles need embeddings of
            their identifiers, as those of ARC do.
    """

    folder: Path

    def __post_init__(self) -> None:
        identifiers = self._index["num_puzzle_identifiers"]
        if identifiers > 1:
            raise ValueError(
                f"{self.folder} has {identifiers} puzzle identifiers, and training here is for "
                f"puzzles without, such as Sudoku and mazes; train it with the public code"
            )

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        file = self.folder / _INDEX
        index = read_json(file)
        wrong = [n for n in _NEEDED if type(index.get(n)) is not int or index[n] < 0]
        if wrong or index["ignore_label_id"] != 0:
            name = wrong[0] if wrong else "ignore_label_id"
            needed = "a whole number" if wrong else "0"
            raise ValueError(f"{file} has {name} = {index.get(name)!r}; {needed} is needed")
        return {name: index[name] for name in _NEEDED}

    @property
    def seq_len(self) -> int:
        """Tokens S of a puzzle."""
        return self._index["seq_len"]

    @property
    def vocab_size(self) -> int:
        """Tokens are below this number."""
        return self._index["vocab_size"]

    def training_batch(self, batch_size: int, seed: int, step: int) -> PuzzleBatch:
        """Draw the training batch of (seed, step) from ``train``, on the CPU."""
        generator = batch_generator(seed, step, 0, "cpu")
        inputs, labels = self._part("train")
        return self._take(
            inputs, labels, torch.randint(len(inputs), (batch_size,), generator=generator)
        )

    def evaluation_batch(self, n_puzzles: int, seed: int) -> PuzzleBatch:
        """Draw puzzles from ``test``: all of them, in random order, if there are fewer."""
        generator = batch_generator(seed, 0, EVALUATION, "cpu")
        inputs, labels = self._part("test")
        return self._take(
            inputs, labels, torch.randperm(len(inputs), generator=generator)[:n_puzzles]
        )

    def _take(self, inputs: np.ndarray, labels: np.ndarray, rows: Tensor) -> PuzzleBatch:
        taken = [
            torch.from_numpy(tokens[rows.numpy()].astype(np.int64)) for tokens in (inputs, labels)
        ]
        for tokens in taken:
            if not ((tokens >= 0) & (tokens < self.vocab_size)).all():
                raise ValueError(f"{self.folder} has tokens outside 0..{self.vocab_size - 1}")
        return PuzzleBatch(*taken)

    def _part(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = (
            _read_array(self.folder / part / f"all__{n}.npy") for n in ("inputs", "labels")
        )
        if inputs.shape != labels.shape or inputs.shape[1:] != (self.seq_len,) or not len(inputs):
            raise ValueError(
                f"{self.folder / part} has inputs {list(inputs.shape)} and labels "
                f"{list(labels.shape)}; [N, {self.seq_len}] is needed of both"
            )
        return inputs, labels


_NEEDED = ("seq_len", "vocab_size", "num_puzzle_identifiers", "ignore_label_id")


def find_puzzles(name: str) -> PuzzleTask:
    """Find puzzles by their short name, or by the folder of a data set.

    Raises:
        ValueError: an unknown name; the message has the nearest. Or as in ``PuzzleFiles``.
        OSError: as in ``PuzzleFiles``.
    """
    if name in PUZZLES:
        return PUZZLES[name]
    if (Path(name) / _INDEX).exists():
        return PuzzleFiles(Path(name))
    unknown = unknown_name("task of --model trm", name, PUZZLES)
    raise ValueError(
        f"{unknown}; or give the folder of a data set of the TRM public code, which has "
        f"{_INDEX.as_posix()} in it"
    )


@functools.lru_cache(maxsize=8)
def _read_array(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file} is no array of numbers: {error}") from None
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"{file} is {array.dtype} {list(array.shape)}; integers [N, S] are needed")
    return array
