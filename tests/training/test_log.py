from __future__ import annotations

import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from looped_fast.training.log import METRICS_FILE, MetricsLog, read_metrics


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path, first_step=0)
    yield log
    log.close()


def steps(run_dir):
    return [line["step"] for line in read_metrics(run_dir / METRICS_FILE)]


def write_steps(run_dir, numbers, first_step):
    log = MetricsLog(run_dir, first_step)
    for step in numbers:
        log.write(step, {"loss": float(step)})
    log.close()


def test_a_line_is_on_disk_as_soon_as_it_is_written(log, tmp_path):
    log.write(3, {"loss": 0.5, "errors": {8: [1.0, 0.25]}})
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text) == {"step": 3, "loss": 0.5, "errors": {"8": [1.0, 0.25]}}
    assert text.endswith("\n")


def test_a_resumed_run_drops_the_lines_that_it_writes_again(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4, 5], first_step=0)
    write_steps(tmp_path, [4, 5, 6], first_step=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_run_from_the_start_drops_everything(tmp_path):
    write_steps(tmp_path, [1, 2], first_step=0)
    write_steps(tmp_path, [1], first_step=0)
    assert steps(tmp_path) == [1]


def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path):
    write_steps(tmp_path, [1, 2], first_step=0)
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text()[:-5])
    assert steps(tmp_path) == [1]
    write_steps(tmp_path, [2, 3], first_step=1)
    assert steps(tmp_path) == [1, 2, 3]


def test_no_file_means_no_lines(tmp_path):
    assert read_metrics(tmp_path / METRICS_FILE) == []


def test_tensorboard_gets_numbers_and_summaries_of_errors(tmp_path):
    log = MetricsLog(tmp_path, first_step=0)
    log.write(1, {"loss": 0.5, "errors": {8: [1.0, 0.5]}, "note": "text"})
    log.write(2, {"loss": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("errors/8_loops/mean")[0].value == 0.75
    assert events.Scalars("errors/8_loops/last_position")[0].value == 0.5


def test_wandb_that_is_not_installed_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match=r"--wandb needs .* pip install 'looped_fast\[wandb\]'"):
        MetricsLog(tmp_path, 0, wandb_project="p")


def test_wandb_gets_the_run_under_its_folders_name(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("finish"),
    )
    fake = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricsLog(tmp_path, 0, wandb_project="p", config={"lr": 1.0})
    log.write(4, {"loss": 0.5})
    log.close()
    started, logged, finished = calls
    assert (started["project"], started["name"]) == ("p", tmp_path.name)
    assert (started["resume"], started["config"]) == ("allow", {"lr": 1.0})
    assert (logged, finished) == (({"loss": 0.5}, 4), "finish")
