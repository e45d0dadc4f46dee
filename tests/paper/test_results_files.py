"""Files of results that ``reproduce`` reads: damaged ones are named, and no computing is lost."""

import json
import os

import pytest

from looped_fast.paper import reproduce


def run(work, *figures):
    line = ["--preset", "tiny", "--prompts", "32", "--work", str(work), "--out", str(work / "docs")]
    return reproduce.main([*figures, *line])


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"key": ', "is not JSON"),
        (b"\x00" * 100, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"a":' * 50_000, "nested too deep"),
        ([], "holds a JSON list"),
        ({"key": 3}, "key is a int"),
        ({"positions": []}, "positions is a list"),
        ({"positions": {}}, "does not hold what looped_fast wrote there"),
        ({"positions": {"looped": {"mean": 3}}, "key": {"models": {}}}, "does not hold what"),
        ({"loops": {"curves": {}}, "positions": {"looped": {}}}, "does not hold what"),
    ],
)
def test_a_damaged_file_of_a_figure_is_named(tmp_path, capsys, content, message):
    path = write(tmp_path / "docs" / "results" / "lr.json", content)
    assert run(tmp_path, "lr") == 2
    error = capsys.readouterr().err
    assert f"error: {path}" in error
    assert message in error


@pytest.mark.parametrize(
    ("figure", "file"),
    [("ablations", "sweeps/mine/sweep.json"), ("openml", "openml/mine/openml.json")],
)
@pytest.mark.parametrize("content", [b"", b"[1]", {}, {"runs": {}}, {"sets": {}}])
def test_a_damaged_file_of_an_experiment_is_named(tmp_path, capsys, figure, file, content):
    path = write(tmp_path / file, content)
    assert run(tmp_path, figure) == 2
    assert f"error: {path}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")
def test_a_fifo_in_place_of_results_is_refused_at_once(tmp_path, capsys):
    path = tmp_path / "docs" / "results" / "lr.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert run(tmp_path, "lr") == 2
    assert f"{path} is a FIFO, socket or device" in capsys.readouterr().err
