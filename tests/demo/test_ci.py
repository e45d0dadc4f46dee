"""``.ci/run`` finds or installs a Chromium before it tests, and goes on without one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".ci" / "run"
BASH = shutil.which("bash")
SKIPPED = "no Chromium was found or installed: the tests of the demo's page are skipped"

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")


@pytest.fixture
def run(tmp_path):
    """Run it with commands that only write down what they are asked; return these and stderr."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))

    def command(name, *, prints="", status=0):
        script = f'#!{BASH}\necho "{name} $*" >> "{tmp_path}/calls"\n{prints}\nexit {status}\n'
        (tmp_path / "bin" / name).write_text(script, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*commands, user="0", **environment):
        command("make")
        command("id", prints=f"echo {user}")
        for name, status in commands:
            command(name, status=status)
        done = subprocess.run(
            [BASH, RUN], capture_output=True, text=True,
            env={"PATH": str(tmp_path / "bin"), **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
        return [call for call in calls if not call.startswith("id")], done.stderr

    return run


@pytest.mark.parametrize("name", ["chromium", "chromium-browser", "google-chrome"])
def test_a_chromium_on_the_path_is_enough(run, name):
    assert run((name, 0), ("apt-get", 0)) == (["make lint", "make test"], "")


def test_a_named_chromium_is_enough(run):
    assert run(("apt-get", 0), LOOPED_FAST_CHROMIUM="/opt/chrome") == (
        ["make lint", "make test"],
        "",
    )


def test_root_installs_one(run):
    calls, said = run(("apt-get", 0))
    assert calls == [
        "apt-get update -qq",
        "apt-get install -qq --no-install-recommends chromium",
        "make lint",
        "make test",
    ]
    assert said == ""


@pytest.mark.parametrize(
    ("commands", "user"), [([], "0"), ([("apt-get", 0)], "1000"), ([("apt-get", 100)], "0")],
    ids=["no apt-get", "not root", "no network"],
)  # fmt: skip
def test_without_one_it_goes_on_and_says_so(run, commands, user):
    calls, said = run(*commands, user=user)
    assert calls[-2:] == ["make lint", "make test"]
    assert "apt-get install" not in "".join(calls)
    assert SKIPPED in said
