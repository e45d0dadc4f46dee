"""Tests marked gpu are collected on a machine without optional packages and git."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Python runs this at its start; it hides packages that such a machine lacks.
BLOCK = """
    from importlib.machinery import PathFinder
    find_spec = PathFinder.find_spec
    absent = ("xgboost", "sklearn", "pandas")
    PathFinder.find_spec = classmethod(
        lambda cls, name, *args: None if name.split(".")[0] in absent else find_spec(name, *args)
    )
"""


@pytest.fixture
def bare(tmp_path):
    """Environment variables of a Python without those packages, on a machine without git."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(BLOCK))
    path = f"{tmp_path}:{ROOT}"
    return {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": path}


def test_gpu_tests_are_collected_without_optional_packages_and_git(bare, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.part", "tests", str(tmp_path), "--dry"]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_gpu.py::test_float64_runs_on_the_reference" in done.stdout  # some of the last
    assert "test_gpu_backends.py::test_a_training_run_measures_and_takes_the_faster" in done.stdout
    assert "tests collected" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]


def test_everything_up_to_the_first_launch_runs_without_a_gpu(bare, tmp_path):
    """Host code and compiler run as on an H100, behind a driver that claims to be one."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.rehearsal"], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env=bare | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if " runs " in line] == [
        "compile runs to its end without a launch",
        "smoke runs up to the launch of fold_kernel",
        "rows runs up to the launch of fold_kernel",
        "steps runs up to the launch of read_in_kernel",
        "profile runs up to the launch of read_in_kernel",
    ]
    assert list((tmp_path / "cache").rglob("fold_kernel.cubin"))
    # At two widths by "compile"; the launch of "steps" is one of them and comes from the cache.
    assert len(list((tmp_path / "cache").rglob("read_in_kernel.cubin"))) == 2
