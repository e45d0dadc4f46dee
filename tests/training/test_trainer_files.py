"""What a run writes to its folder: resumed, diverged, killed, or beside another process."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import held_elsewhere
from test_checkpoint_read import sealed_index_with

from looped_fast.training import checkpoint
from looped_fast.training.checkpoint import CheckpointError
from looped_fast.training.distributed import Processes
from looped_fast.training.lock import InUseError
from looped_fast.training.log import METRICS_FILE, read_metrics
from looped_fast.training.presets import preset_config
from looped_fast.training.step import Start
from looped_fast.training.trainer import NonFiniteError, Trainer

CONFIG = dataclasses.replace(
    preset_config("tiny"), n_embd=32, n_head=2, batch_size=4, n_points=6, n_positions=6, n_loops=3,
    window=2, eval_prompts=8, steps=10, save_every=7, log_every=5, eval_every=10, device="cpu",
)  # fmt: skip


class Killed(BaseException):
    """Simulates a kill."""


def train(run_dir, killed_at=None, **changes):
    """Train to the end, or to a kill before step ``killed_at``, from the latest checkpoint."""
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(dataclasses.replace(CONFIG, **changes), run_dir, newest(run_dir))
    step = trainer.training_step

    def training_step():
        if trainer.step == killed_at:
            raise Killed
        step()

    trainer.training_step = training_step
    if killed_at is None:
        trainer.fit()
    else:
        with pytest.raises(Killed):
            trainer.fit()
    return trainer


def newest(run_dir):
    latest = checkpoint.latest(run_dir)
    return None if latest is None else checkpoint.load(latest)


def log(run_dir):
    """Lines of the log without rates, which are measured."""
    lines = read_metrics(run_dir / METRICS_FILE)
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]


# ---- the log of a resumed run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"log_every": 9},
        {"log_every": 100},
        {"log_every": 7},
        {"save_every": 1},
        {"amp": "fp16"},
        {"train_prompts": 9},
    ],
    ids=str,
)
def test_lines_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path, changes):
    train(tmp_path / "whole", **changes)
    train(tmp_path / "parts", killed_at=8, **changes)
    train(tmp_path / "parts", **changes)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert log(tmp_path / "whole")[-1]["step"] == 10


def test_a_run_that_is_killed_twice_before_a_line_is_due_sums_all_its_steps(tmp_path):
    settings = {"save_every": 3, "log_every": 100}
    train(tmp_path / "whole", **settings)
    for killed_at in (4, 8):
        train(tmp_path / "parts", killed_at, **settings)
    train(tmp_path / "parts", **settings)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def with_unlogged(run_dir, entry, **more):
    latest = checkpoint.latest(run_dir)
    meta = {**checkpoint.load(latest).meta, "unlogged": entry, **more}
    if entry is None:
        del meta["unlogged"]
    sealed_index_with(meta=meta)(latest / checkpoint.INDEX)
    return checkpoint.load(latest)


def test_each_process_continues_its_own_sums(tmp_path):
    train(tmp_path, killed_at=8)
    rows = [[1.5, 2.0, 3.0], [4.5, 5.0, 7.0]]
    saved = with_unlogged(tmp_path, {"steps": 2, "sums": rows}, processes=2)
    for rank in range(2):
        trainer = Trainer(CONFIG, tmp_path, saved, Processes(rank, 2))
        assert trainer._sums.tolist() == rows[rank]
        assert trainer._steps_in_sums == 2
    assert Trainer(CONFIG, tmp_path, saved)._sums.tolist() == [3.0, 3.5, 5.0]  # now a single one


def test_a_checkpoint_of_an_older_version_has_no_sums(tmp_path):
    train(tmp_path, killed_at=8)
    trainer = Trainer(CONFIG, tmp_path, with_unlogged(tmp_path, None))
    trainer.fit()
    assert [line["step"] for line in log(tmp_path)] == [5, 10, 10]


@pytest.mark.parametrize(
    "entry",
    [
        5,
        [],
        {},
        {"steps": 2},
        {"steps": "2", "sums": [[1.0, 1.0, 1.0]]},
        {"steps": -1, "sums": [[1.0, 1.0, 1.0]]},
        {"steps": 8, "sums": [[1.0, 1.0, 1.0]]},
        {"steps": 2, "sums": []},
        {"steps": 2, "sums": [1.0, 1.0, 1.0]},
        {"steps": 2, "sums": [[1.0, 1.0]]},
        {"steps": 2, "sums": [[1.0, 1.0, 1.0]] * 2},
        {"steps": 2, "sums": [[1.0, 1.0, math.nan]]},
        {"steps": 2, "sums": [[1.0, 1.0, "1"]]},
    ],
    ids=str,
)
def test_sums_that_are_none_are_named(tmp_path, entry):
    train(tmp_path, killed_at=8)
    saved = with_unlogged(tmp_path, entry)
    with pytest.raises(CheckpointError, match=r"checkpoint.json has a wrong entry meta.unlogged"):
        Trainer(CONFIG, tmp_path, saved)


@pytest.mark.parametrize("n_processes", [0, -1, True, "2", 1.0, None, [], 1e30], ids=str)
def test_a_count_of_processes_that_is_none_is_named(tmp_path, n_processes):
    train(tmp_path, killed_at=8)
    saved = with_unlogged(tmp_path, None, processes=n_processes)
    with pytest.raises(CheckpointError, match=r"checkpoint.json has meta.processes = "):
        Trainer(CONFIG, tmp_path, saved)


# ---- the last update


@pytest.mark.parametrize(
    "changes", [{"lr": math.inf}, {"lr": 3e38, "weight_decay": 1e30}, {"weight_decay": math.inf}]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path, changes, steps):
    settings = {"warmup_steps": 0, "lr_decay": "none", "save_every": 1, "steps": steps, **changes}
    with pytest.raises(NonFiniteError, match=r"step 1\. No checkpoint was written of it; .* --lr"):
        train(tmp_path, **settings)
    assert checkpoint.latest(tmp_path) is None
    assert not any("errors" in line for line in log(tmp_path))  # of a model that is no more


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_a_number_lost_in_the_last_step_is_named(tmp_path, part):
    train(tmp_path, killed_at=9, save_every=9)
    trainer = Trainer(CONFIG, tmp_path, newest(tmp_path))
    trainer.training_step()
    parameter = trainer.model._read_out.bias
    tensor = parameter if part == "weight" else trainer.optimizer.state[parameter]["exp_avg_sq"]
    with torch.no_grad():
        tensor.fill_(torch.inf)
    name = "_read_out.bias" if part == "weight" else "exp_avg_sq/_read_out.bias"
    with pytest.raises(NonFiniteError, match=rf"^{name} holds 1 of 1 numbers .* after step 10\."):
        trainer.save()
    assert newest(tmp_path).step == 9


def test_a_run_does_not_start_from_weights_that_are_not_finite(tmp_path):
    state = Trainer(CONFIG, tmp_path).model.state_dict()
    state["_read_in.bias"] = torch.full_like(state["_read_in.bias"], torch.nan)
    with pytest.raises(CheckpointError, match=r"a.pt: _read_in.bias holds 32 of 32 numbers"):
        Trainer(CONFIG, tmp_path, start=Start(Path("a.pt"), state))


# ---- beside another process, and after a kill


def test_a_trainer_does_not_write_to_a_folder_that_is_in_use(tmp_path):
    train(tmp_path, killed_at=8)
    before = (tmp_path / METRICS_FILE).read_bytes()
    trainer = Trainer(CONFIG, tmp_path, newest(tmp_path))
    message = rf"is in use: process {os.getpid()} on"
    with held_elsewhere(tmp_path), pytest.raises(InUseError, match=message):
        trainer.fit()
    assert (tmp_path / METRICS_FILE).read_bytes() == before
    trainer.fit()  # afterwards it does


def test_a_trainer_holds_its_folder_while_it_trains(tmp_path):
    trainer = Trainer(CONFIG, tmp_path)
    step, refused = trainer.training_step, []

    def training_step():
        step()
        try:
            with held_elsewhere(tmp_path):
                pass
        except InUseError as error:
            refused.append(error)

    trainer.training_step = training_step
    trainer.fit()
    assert len(refused) == 10
    with held_elsewhere(tmp_path):
        pass


def test_leftovers_of_a_finished_run_are_removed_when_it_is_opened_again(tmp_path):
    train(tmp_path, save_every=2, keep=2)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000010", folder / ".tmp-step-00000006")
    shutil.copytree(folder / "step-00000008", folder / "step-00000004")
    train(tmp_path, save_every=2, keep=2)
    assert sorted(os.listdir(folder)) == ["step-00000008", "step-00000010"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", METRICS_FILE, "tensorboard"]


def test_leftovers_stay_while_another_process_writes(tmp_path):
    train(tmp_path)
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000020"
    leftover.mkdir()
    with held_elsewhere(tmp_path), pytest.raises(InUseError):
        train(tmp_path)
    assert leftover.exists()
