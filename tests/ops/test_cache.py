"""Files of measured times and choices: what is damaged in them is said, and the rest is used."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest
from conftest import CALL, changed

from looped_fast.ops import backend_times, cache

STEP = changed(CALL, device="cuda", precision="bf16", replayed=True, training=True)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend_times, "_device_name", str)
    backend_times._known.cache_clear()
    yield
    backend_times._known.cache_clear()


def write(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))


GOOD = {"triton": 2.5, "compiled": 3}
BAD_TIMES = [
    3, None, [], "fast", {"triton": "fast"}, {"triton": None}, {"triton": True}, {"triton": -1.0},
    {"triton": 0}, {"triton": float("nan")}, {"triton": float("inf")}, {"tritn": 2.5},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_TIMES, ids=str)
def test_a_damaged_time_is_said_and_the_others_are_used(caplog, bad):
    write(backend_times.path(), {"a": GOOD, "b": bad})
    assert backend_times._known() == {"a": GOOD}
    backend_times._known()
    (message,) = caplog.messages
    assert message.startswith(f"{backend_times.path()}: ignoring b = ")
    assert message.endswith(", measuring afresh")


def test_intact_files_are_read_without_a_word(caplog):
    assert backend_times._known() == {}
    write(backend_times.path(), {"a": GOOD})
    backend_times._known.cache_clear()
    assert backend_times._known() == {"a": GOOD}
    assert caplog.messages == []


def test_a_damaged_choice_is_said_once_and_the_others_are_used(caplog):
    tuning = pytest.importorskip("looped_fast.kernels.tuning", exc_type=ImportError)
    good = tuning.Config(64, num_warps=8)
    damaged = [3, {}, {"rows": 3}, *({**asdict(good), "rows": x} for x in ("64", 1.5, -1, True))]
    damaged.append({**asdict(good), "more": 1})
    write(tuning.cache_file(), {"good": asdict(good), **dict(enumerate(damaged))})
    for _ in range(2):
        assert tuning._stored() == {"good": good}
    assert len(caplog.messages) == len(damaged)
    assert all(f"{tuning.cache_file()}: ignoring " in message for message in caplog.messages)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_cannot_be_read_is_said_once(caplog, tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    for _ in range(3):
        assert cache.load(path) == {}
    (message,) = caplog.messages
    assert message.startswith(f"can't read {path}, measuring afresh: ")


def test_a_pipe_in_place_of_a_file_does_not_hang(caplog, tmp_path):
    os.mkfifo(tmp_path / "file.json")
    assert cache.load(tmp_path / "file.json") == {}
    assert "is a FIFO, socket or device" in caplog.text


def test_a_file_that_is_in_use_stays_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    """Windows replaces no file that another process reads."""
    write(tmp_path / "file.json", {"a": 1})

    def in_use(*_):
        raise PermissionError(13, "in use by another process")

    monkeypatch.setattr("pathlib.Path.replace", in_use)
    reason = cache.update(tmp_path / "file.json", {"b": 2})
    assert reason == f"{tmp_path / 'file.json'} can't be written: in use by another process"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert cache.load(tmp_path / "file.json") == {"a": 1}
