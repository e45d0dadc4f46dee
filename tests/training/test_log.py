from __future__ import annotations

import json
import os
import shutil
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
    with pytest.raises(RuntimeError, match=r"--wandb needs .* pip install wandb"):
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


# ---- damage


BAD_LINES = {
    "garbage": b"garbage",
    "zeros after a power cut": bytes(40),
    "cut short": b'{"step": 3, "loss": 0.',
    "no entries": b"{}",
    "null": b"null",
    "a number": b"5",
    "a list": b'[{"step": 3}]',
    "no step": b'{"loss": 0.5}',
    "step null": b'{"step": null}',
    "step a text": b'{"step": "3"}',
    "step true": b'{"step": true}',
    "step a fraction": b'{"step": 3.5}',
    "step NaN": b'{"step": NaN}',
    "step negative": b'{"step": -3}',
    "no UTF-8": b'{"step": 3, "note": "\xff"}',
    "UTF-16": '{"step": 3}'.encode("utf-16"),
    "nested deep": b"[" * 100_000,
    "5000 digits": b'{"step": ' + b"3" * 5000 + b"}",
    "two lines in one": b'{"step": 3}{"step": 4}',
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path, bad):
    write_steps(tmp_path, [1, 2, 3, 4, 5], first_step=0)
    path = tmp_path / METRICS_FILE
    lines = path.read_bytes().split(b"\n")
    lines[2] = bad
    content = b"\n".join(lines)
    path.write_bytes(content)
    message = r"metrics.jsonl, line 3 is damaged .*delete this line, or move the file away"
    with pytest.raises(RuntimeError, match=message):
        read_metrics(path)
    for first_step in (0, 4, 10):
        with pytest.raises(RuntimeError, match=message):
            MetricsLog(tmp_path, first_step)
    assert path.read_bytes() == content


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n"], ids=["", "newline", "newlines"])
def test_a_damaged_last_line_is_dropped_and_said(tmp_path, caplog, bad, ending):
    write_steps(tmp_path, [1, 2], first_step=0)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + bad + ending)
    assert steps(tmp_path) == [1, 2]
    assert len(caplog.messages) == 1
    assert f"{path}, line 3: dropped, since the last line is damaged: b'" in caplog.text
    write_steps(tmp_path, [3], first_step=2)
    caplog.clear()
    assert steps(tmp_path) == [1, 2, 3]
    assert caplog.messages == []


def test_a_resumed_run_keeps_lines_as_they_were_written(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"loss":1.50, "step" : 1}\n\n{"step": 2, "loss": NaN}\n{"step": 3}')
    write_steps(tmp_path, [3], first_step=2)
    assert path.read_text() == (
        '{"loss":1.50, "step" : 1}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 3.0}\n'
    )


def test_a_pipe_in_place_of_the_log_is_named(tmp_path):
    os.mkfifo(tmp_path / METRICS_FILE)
    with pytest.raises(ValueError, match=r"metrics.jsonl is a FIFO, socket or device"):
        MetricsLog(tmp_path, 0)


def test_a_full_disk_names_file_and_step(log, tmp_path):
    log._file.close()
    log._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", 0)  # raises ENOSPC
    with pytest.raises(OSError, match=r"can't write step 3 to .*metrics\.jsonl: No space left"):
        log.write(3, {"loss": 0.5})


def test_a_kill_while_the_log_is_rewritten_loses_no_line(tmp_path, monkeypatch):
    write_steps(tmp_path, [1, 2, 3], first_step=0)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(tmp_path, 2)
    assert steps(tmp_path) == [1, 2, 3]
    write_steps(tmp_path, [3], first_step=2)
    assert steps(tmp_path) == [1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == [METRICS_FILE, "tensorboard"]


def killed(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["removed", "moved", "replaced"])
def test_a_folder_that_is_gone_is_named_and_nothing_is_written(tmp_path, caplog, what):
    run = tmp_path / "run"
    run.mkdir()
    log = MetricsLog(run, 0)
    log.write(1, {"loss": 1.0})
    if what == "removed":
        shutil.rmtree(run)
    else:
        run.rename(tmp_path / "elsewhere")
    if what == "replaced":
        run.mkdir()
        (run / METRICS_FILE).write_text("")
    with pytest.raises(OSError, match=rf"{run} was removed or moved while the run was training"):
        log.write(2, {"loss": 1.0})
    log.close()  # raises nothing, and neither does TensorBoard's thread
    if what == "moved":
        assert steps(tmp_path / "elsewhere") == [1]
    assert run.exists() == (what == "replaced")
