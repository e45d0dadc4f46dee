"""Compilation before a kernel's first launch, tested without a GPU: see ``fake_h100``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NO_TRITON

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import ahead


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder, root = tmp_path_factory.mktemp("fake_h100"), Path(__file__).parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "XDG_CACHE_HOME": str(folder),
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, root / "tests" / "fake_h100.py"]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("order", ["loop last", "hash first"])
def test_cache_keys_do_not_depend_on_the_order_of_use(seen, order) -> None:
    assert seen[f"keys, {order}"] == seen["keys, loop first"]


def test_without_settling_cache_keys_depend_on_the_order_of_use(seen) -> None:
    """Keys do depend on it in Triton 3.6; otherwise the test above would show nothing."""
    if seen["Triton's keys"] == seen["Triton's keys, reversed"]:
        pytest.skip("keys do not depend on the order in this version of Triton")
    assert seen["Triton's keys"] != seen["keys, loop first"]


def compiled(events: list) -> set[str]:
    return {name for event, name in events if event == "compile"}


def test_everything_is_compiled_before_the_first_launch(seen) -> None:
    first_use = seen["first use"]
    assert {event for event, _ in first_use["run"]} == {"launch"}
    launched = {name for _, name in first_use["run"]}
    assert len({name.split()[0] for name in launched}) == 5  # kernels of a loop
    assert launched <= compiled(first_use["ahead"])


def test_several_kernels_are_compiled_at_a_time(seen) -> None:
    assert seen["first use"]["most at a time"] == 4  # as many as there are cores


def test_candidates_come_first_and_other_forms_of_the_chosen_alone(seen) -> None:
    ahead = seen["first use"]["ahead"]
    events = [event for event, _ in ahead]
    choices = [i for i, event in enumerate(events) if event == "choose"]
    assert [ahead[i][1] for i in choices] == [
        "row_forward_kernel", "attention_forward_kernel",
        "row_backward_kernel", "attention_backward_kernel",
    ]  # fmt: skip
    before, after = ahead[: choices[0]], ahead[choices[-1] + 1 :]
    assert len(before) == 1 + 4 * 3  # the fold, and three candidates of four kernels
    launched = {name for _, name in seen["first use"]["run"]}
    assert after
    assert compiled(after) <= launched  # only launched kernels are compiled
    assert {name.split()[0] for name in compiled(after)} == {
        "row_forward_kernel", "row_backward_kernel",
    }  # fmt: skip


def test_a_second_call_compiles_nothing(seen) -> None:
    assert seen["first use"]["ahead again"] == []


def test_an_error_comes_with_the_launch(seen) -> None:
    assert seen["failure"] == "read_in_kernel can't be compiled"


def test_threads_make_machine_code(seen) -> None:
    (size,) = seen["a real kernel"]
    assert size > 1000


def test_nothing_happens_off_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "_done", set())
    ahead.compile_ahead("key", torch.device("cpu"), lambda: pytest.fail("it ran"))
    assert not ahead._done


def test_host_code_that_does_not_fit_twice_is_left_to_its_launches(monkeypatch, caplog) -> None:
    monkeypatch.setattr(ahead, "_done", set())
    monkeypatch.setattr(ahead, "_can_compile", lambda device: True)
    ran = []

    def host_code() -> None:
        ran.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level("INFO"):
        for _ in range(2):
            ahead.compile_ahead("key", torch.device("cpu"), host_code)
    assert len(ran) == 1
    assert "no memory to compile kernels ahead" in caplog.text


def test_cores_are_counted_on_systems_that_pin_no_process(monkeypatch) -> None:
    if hasattr(os, "sched_getaffinity"):
        assert ahead._n_cores() == len(os.sched_getaffinity(0))
        monkeypatch.delattr("os.sched_getaffinity")  # Windows and macOS have none
    assert ahead._n_cores() == os.cpu_count()
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert ahead._n_cores() == 1
