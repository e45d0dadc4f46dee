"""One process at a time writes to a run's folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import held_elsewhere
from test_checkpoint import names, save, start

from looped_fast.training import checkpoint, lock
from looped_fast.training.lock import LOCK_FILE, InUseError, hold

HOLDER = """
    import signal, sys, time
    from looped_fast.training.lock import hold
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with hold(sys.argv[1]):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock on ``tmp_path / "run"``."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    for _ in range(2):
        with (
            pytest.raises(InUseError, match=rf"run is in use: process {holder.pid} on .* since 20"),
            hold(tmp_path / "run"),
        ):
            pass
    with pytest.raises(InUseError):
        save(tmp_path / "run", 1, *start())
    with pytest.raises(InUseError):
        checkpoint.tidy(tmp_path / "run", 3)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_the_lock_of_a_process_ends_with_it(tmp_path, holder, signum):
    holder.send_signal(signum)
    holder.wait(10)
    with hold(tmp_path / "run"):
        assert f"process {os.getpid()} on " in (tmp_path / "run" / LOCK_FILE).read_text()


def test_the_file_is_there_only_while_the_lock_is_held(tmp_path):
    with hold(tmp_path / "new" / "run"):
        assert os.listdir(tmp_path / "new" / "run") == [LOCK_FILE]
    assert os.listdir(tmp_path / "new" / "run") == []


def test_the_thread_that_holds_it_enters_again_and_another_does_not(tmp_path):
    with hold(tmp_path):
        with hold(tmp_path / ".." / tmp_path.name), hold(str(tmp_path)):
            pass
        assert (tmp_path / LOCK_FILE).exists()
        with pytest.raises(InUseError, match=rf"process {os.getpid()} on "):
            held_elsewhere(tmp_path).__enter__()
    with held_elsewhere(tmp_path), pytest.raises(InUseError), hold(tmp_path):
        pass


def test_an_error_inside_releases_it(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    with hold(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_neither_holds_nor_releases_it(tmp_path):
    run_dir = tmp_path / "run"
    reader, writer = os.pipe()
    with hold(run_dir):
        child = os.fork()
        if child:
            assert os.read(reader, 10) == b"refused"
        else:  # leaves the block, and then outlives the parent's lock
            try:
                with hold(run_dir):
                    os.write(writer, b"entered")
            except InUseError:
                os.write(writer, b"refused")
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        with hold(run_dir):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_fork_that_ends_leaves_the_lock_to_its_parent(tmp_path):
    with hold(tmp_path):
        child = os.fork()
        if not child:
            with hold(tmp_path / "another"):
                os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / LOCK_FILE).exists()
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert f"InUseError: {tmp_path} is in use: process {os.getpid()}" in done.stderr


def test_many_processes_that_want_it_at_once_never_share_it(tmp_path):
    script = """
        import os, sys, time
        from looped_fast.training.lock import InUseError, hold
        entered = 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            try:
                with hold(sys.argv[1]):
                    os.mkdir(sys.argv[1] + "/inside")  # raises if another is inside
                    os.rmdir(sys.argv[1] + "/inside")
                    entered += 1
            except InUseError:
                pass
        print(entered)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    entered = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(map(int, entered)) > 10
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(stream):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", no_locks)
    with hold(tmp_path):
        pass
    assert "this file system has no locks (No locks available)" in caplog.text


def test_a_folder_deleted_and_made_again_meanwhile_keeps_the_lock_of_its_new_holder(tmp_path):
    run_dir = tmp_path / "run"
    with hold(run_dir):
        (run_dir / LOCK_FILE).unlink()
        (run_dir / LOCK_FILE).write_text("another process's")
    assert (run_dir / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"), hold(tmp_path / "file" / "run"):
        pass


# ---- what a kill left


def leave(run_dir, *folders):
    for folder in folders:
        (run_dir / "checkpoints" / folder).mkdir()


def test_tidying_removes_what_a_kill_left(tmp_path):
    model, optimizer = start()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, keep=5)
    leave(tmp_path, ".tmp-step-00000001", ".tmp-step-00000004", "step-00000003.old")
    checkpoint.tidy(tmp_path, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_tidying_keeps_a_replaced_checkpoint_without_its_successor(tmp_path):
    model, optimizer = start()
    for step in (1, 2):
        path = save(tmp_path, step, model, optimizer)
    path.rename(path.with_name("step-00000002.old"))
    checkpoint.tidy(tmp_path, keep=1)
    assert names(tmp_path) == ["step-00000002.old"]
    assert checkpoint.load(checkpoint.latest(tmp_path)).step == 2


def test_tidying_a_folder_without_checkpoints_does_nothing(tmp_path):
    checkpoint.tidy(tmp_path, keep=1)
    assert os.listdir(tmp_path) == []
