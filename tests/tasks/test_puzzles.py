"""Puzzles by name, and data sets of the TRM public code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from looped_fast.tasks import make_task
from looped_fast.tasks.puzzles import PUZZLES, PuzzleFiles, _read_array, find_puzzles

INDEX = {
    "seq_len": 9, "vocab_size": 5, "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0,
    "num_puzzle_identifiers": 1, "total_groups": 4, "mean_puzzle_examples": 1, "sets": ["all"],
}  # fmt: skip


def write(folder, part="train", n=4, index=INDEX, dtype=np.uint8, **arrays):
    """A part of a data set, as dataset/build_sudoku_dataset.py writes it."""
    _read_array.cache_clear()
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / "dataset.json").write_text(json.dumps(index))
    base = np.arange(n * 9).reshape(n, 9) % 5
    for name in ("inputs", "labels"):
        np.save(folder / part / f"all__{name}.npy", arrays.get(name, base).astype(dtype))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train", 4)
    write(tmp_path, "test", 3, inputs=np.ones((3, 9)), labels=np.arange(27).reshape(3, 9) % 5)
    return tmp_path


def test_puzzles_have_names():
    assert find_puzzles("sudoku6") is PUZZLES["sudoku6"]
    with pytest.raises(ValueError, match=r"did you mean 'sudoku6'\?.*folder of a data set"):
        find_puzzles("sudoku66")
    with pytest.raises(ValueError, match=r"task 'sudoku4' is one of puzzles.*add --model trm"):
        make_task("sudoku4", 3)


def test_a_data_set_is_found_by_its_folder(folder):
    task = find_puzzles(str(folder))
    assert isinstance(task, PuzzleFiles)
    assert (task.seq_len, task.vocab_size) == (9, 5)
    inputs, labels = task.training_batch(64, seed=0, step=0)
    assert inputs.shape == labels.shape == (64, 9)
    assert inputs.dtype == torch.int64
    rows = torch.arange(36).view(4, 9) % 5
    assert {tuple(r) for r in inputs.tolist()} == {tuple(r) for r in rows.tolist()}


def test_batches_are_a_pure_function_of_seed_and_step(folder):
    task = find_puzzles(str(folder))
    batches = [task.training_batch(32, *key).inputs for key in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[3])


def test_an_evaluation_takes_each_test_puzzle_once(folder):
    inputs, labels = find_puzzles(str(folder)).evaluation_batch(10, seed=0)
    assert inputs.tolist() == [[1] * 9] * 3
    assert sorted(labels[:, 0].tolist()) == [0, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_puzzle_identifiers": 877}, "has 877 puzzle identifiers"),
        ({"seq_len": "9"}, "has seq_len = '9'; a whole number is needed"),
        ({"vocab_size": None}, "has vocab_size = None; a whole number is needed"),
        ({"ignore_label_id": -100}, "has ignore_label_id = -100; a whole number is needed"),
        ({"ignore_label_id": 3}, "has ignore_label_id = 3; 0 is needed"),
    ],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else "",
)
def test_what_a_data_set_says_of_itself_is_checked(tmp_path, change, message):
    write(tmp_path, index=INDEX | change)
    with pytest.raises(ValueError, match=message):
        find_puzzles(str(tmp_path))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros((3, 9))}, r"inputs \[4, 9\] and labels \[3, 9\]; \[N, 9\] is needed"),
        ({"inputs": np.zeros((4, 8)), "labels": np.zeros((4, 8))}, r"\[N, 9\] is needed"),
        ({"inputs": np.zeros((0, 9)), "labels": np.zeros((0, 9))}, r"\[N, 9\] is needed"),
        ({"inputs": np.full((4, 9), 5)}, r"tokens outside 0\.\.4"),
        ({"inputs": np.zeros(9)}, r"integers \[N, S\] are needed"),
        ({"dtype": np.float32}, r"float32 \[4, 9\]; integers"),
        ({"dtype": object}, "is no array of numbers"),
    ],
    ids=["lengths", "width", "empty", "token", "flat", "floats", "pickle"],
)
def test_arrays_are_checked(tmp_path, arrays, message):
    write(tmp_path, **arrays)
    with pytest.raises(ValueError, match=message):
        find_puzzles(str(tmp_path)).training_batch(2, 0, 0)


def test_a_missing_part_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"all__inputs\.npy"):
        find_puzzles(str(tmp_path)).evaluation_batch(2, 0)
