"""The examples run, as scripts and as notebooks of the same cells, and docs show their pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.with_suffix(".ipynb").exists())
NAMES = [path.stem for path in SCRIPTS]
EVERY = pytest.mark.parametrize("name", NAMES)

pytest.importorskip("matplotlib")


@pytest.fixture
def environment(tmp_path):
    """This source tree's package, two threads at most, and a folder for pictures."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PICTURES": str(tmp_path),
        "MPLBACKEND": "agg",
        "OMP_WAIT_POLICY": "passive",
    }


def pictures(folder):
    return {path.name for path in folder.glob("*.png") if path.stat().st_size > 5000}


def test_there_are_four():
    assert NAMES == ["drop_in", "enough_loops", "looking_inside", "own_task"]


@EVERY
def test_a_script_is_short(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


@EVERY
def test_a_script_runs_and_draws(name, tmp_path, environment):
    done = subprocess.run(
        [sys.executable, f"{name}.py"], cwd=FOLDER, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    assert pictures(tmp_path) == {f"examples-{name.replace('_', '-')}.png"}


CHECKOUT = """
from foreign_models import Looped, Settings

def TransformerModelLooped(n_dims, n_positions, n_embd, n_layer, n_head):
    print("the checkout's model")
    return Looped(Settings(n_embd, n_head, n_layer, positions=2 * n_positions), n_dims=n_dims)
"""


def test_the_drop_in_takes_the_model_of_an_official_checkout(tmp_path, environment):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "models.py").write_text(CHECKOUT, encoding="utf-8")
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "drop_in.py"], cwd=FOLDER, capture_output=True, text=True,
        env={**environment, "LOOPED_TRANSFORMER": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the checkout's model\n")
    assert "fp32: gradients differ by at most" in done.stdout


@EVERY
def test_a_notebook_has_the_cells_of_its_script(name):
    jupytext = pytest.importorskip("jupytext", reason="pip install jupytext")
    script, notebook = (jupytext.read(FOLDER / f"{name}.{kind}") for kind in ("py", "ipynb"))
    cells = [(cell.cell_type, cell.source) for cell in script.cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == cells
    assert len(cells) >= 3
    assert not any(cell.get("outputs") for cell in notebook.cells)


@EVERY
def test_a_notebook_runs(name, tmp_path, environment, monkeypatch):
    """In a kernel of its own, as Jupyter runs it."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient")
    pytest.importorskip("ipykernel", reason="pip install ipykernel")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    there = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=there).execute()
    assert pictures(tmp_path) == {f"examples-{name.replace('_', '-')}.png"}
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_the_page_shows_every_example_with_its_picture():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for name in NAMES:
        picture = f"examples-{name.replace('_', '-')}.png"
        assert f"](../examples/{name}.py)" in page
        assert f"](../examples/{name}.ipynb)" in page
        assert f"]({picture})" in page
        assert 5000 < (ROOT / "docs" / picture).stat().st_size <= 80_000
