"""What setup.py builds; ``make dist`` builds and installs all of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("setuptools", "77")


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree, without what is large."""
    for folder in ("looped_fast", "csrc", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def build(tree, *flags, **environment):
    """Run setup.py; return the built package's folder, and what was said."""
    done = subprocess.run(
        [sys.executable, *flags, "setup.py", "build", "--build-lib", "built"],
        cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tree / "built" / "looped_fast", done.stderr


def test_a_build_without_a_compiler_says_so_and_has_the_sources(tree):
    package, said = build(tree, CXX="no-such-one")
    assert "a wheel without the CPU engine: CXX names no-such-one" in said
    assert {file.name for file in (package / "csrc").iterdir()} == {
        file.name for file in (ROOT / "csrc").iterdir() if file.name != "__pycache__"
    }
    assert (package / "kernels" / "candidates.json").exists()
    assert {file.name for file in (package / "demo").glob("page.*")} == {
        "page.css", "page.html", "page.js", "page.py",
    }  # fmt: skip
    assert not list(package.rglob("*.so"))


def test_a_build_that_sees_no_torch_compiles_nothing(tree):
    package, said = build(tree, "-S", CXX="no-such-one", PYTHONPATH=setuptools_alone(tree))
    assert "engine" not in said
    assert (package / "csrc" / "ops.cpp").exists()


def setuptools_alone(tree):
    """A folder with setuptools, as in an isolated build."""
    import setuptools

    folder = tree / "isolated"
    folder.mkdir()
    for source in Path(setuptools.__file__).parent.parent.glob("*"):
        if source.name.startswith(("setuptools", "pkg_resources", "_distutils_hack")):
            (folder / source.name).symlink_to(source)
    return str(folder)


def test_what_is_gone_from_the_tree_is_gone_from_the_build(tree):
    stale = tree / "built" / "looped_fast" / "ops" / "engine-torch2.8-0123456789ab.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    build(tree, CXX="no-such-one")
    assert not stale.exists()
