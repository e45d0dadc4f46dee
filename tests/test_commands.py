"""``looped-fast`` and ``python -m looped_fast``: every command, by either of its spellings."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_command import MINI

from looped_fast.__main__ import COMMANDS, main
from looped_fast.config import VERSION

ROOT = Path(__file__).parent.parent
MODULES = {name: f"looped_fast.{name.replace('-', '_')}" for name in COMMANDS}
SPELLINGS = sorted({*COMMANDS, *(name.replace("-", "_") for name in COMMANDS)})


def run_python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=cwd, timeout=120
    )


@pytest.fixture
def script(tmp_path):
    """The console script that pip makes of the entry in pyproject.toml."""
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n[")[0]
    [(name, module, function)] = re.findall(r'^([\w-]+) = "([\w.]+):(\w+)"$', scripts, re.M)
    assert name == "looped-fast"
    path = tmp_path / name
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom {module} import {function}\n"
        f"if __name__ == '__main__':\n    sys.exit({function}())\n"
    )
    return str(path)


def test_every_module_that_runs_is_a_command():
    runs = {
        f"looped_fast.{path.stem}"
        for folder in ("looped_fast", "looped_fast/moved")
        for path in (ROOT / folder).glob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text() and path.stem != "__main__"
    }
    packages = {f"looped_fast.{p.parent.name}" for p in ROOT.glob("looped_fast/*/__main__.py")}
    assert set(MODULES.values()) == runs | packages


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]], ids=str)
def test_the_commands_are_listed_with_a_line_each(capsys, args):
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert listed == [[name, what] for name, what in COMMANDS.items()]
    assert max(map(len, lines)) <= 100


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"looped_fast {VERSION}\n"


def test_listing_the_commands_imports_none_of_them():
    code = (
        "import sys, looped_fast, looped_fast.__main__ as command; before = set(sys.modules)\n"
        "command.main([]); command.main(['--version']); command.main(['tran'])\n"
        "assert set(sys.modules) == before, set(sys.modules) - before"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("tran", "train"), ("evalute", "evaluate"), ("eval", "evaluate"), ("sweeps", "sweep"),
        ("open_ml", "openml"), ("state_probe", "state-probes"), ("Train", "train"),
        ("env_reports", "env-report"), ("report_env", "env-report"), ("preset", "presets"),
    ],
)  # fmt: skip
def test_an_unknown_command_gets_the_nearest_and_exit_2(capsys, given, nearest):
    assert main([given, "--steps", "3"]) == 2
    printed = capsys.readouterr()
    assert f"unknown command {given!r}; did you mean {nearest!r}? Valid: train, " in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("given", ["", "zzz"])
def test_a_command_like_no_other_gets_the_list(capsys, given):
    assert main([given, "tiny"]) == 2
    assert f"unknown command {given!r}. Valid: train, evaluate, " in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--preset", "-v", "--verson", "--", "-"])
def test_a_flag_before_the_command_is_no_command(capsys, given):
    assert main([given, "tiny"]) == 2
    message = f"error: unknown flag {given}; the command comes first: looped-fast COMMAND {given}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", SPELLINGS)
def test_a_command_gets_its_arguments_and_its_status_is_passed_on(monkeypatch, given):
    calls = []
    module = MODULES[given.replace("_", "-")]
    module += ".__main__" if given in ("demo", "pretrained") else ""
    command = importlib.import_module(module)
    monkeypatch.setattr(command, "main", lambda args: calls.append(args) or 143)
    assert main([given, "--a", "b"]) == 143
    monkeypatch.setattr(sys, "argv", ["looped-fast", given])
    assert main() == 143
    assert calls == [["--a", "b"], []]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--stepss", "3"], "did you mean --steps?"),
        (["evaluate"], "no run is given"),
        (["sweep", "injektion"], "did you mean 'injection'?"),
        (["presets", "smal"], "did you mean 'small'?"),
        (["env-report", "--verbose"], "unknown flag --verbose"),
        (["demo", "--max-loop", "3"], "did you mean --max-loops?"),
        (["pretrained", "nowhere", "--cpu-minutes", "1", "--how", "x"], "holds no checkpoint"),
    ],
    ids=" ".join,
)
def test_errors_of_a_command_exit_with_its_status(capsys, args, message):
    try:
        status = main(args)
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_command_that_succeeds_exits_with_0(capsys):
    assert main(["presets", "tiny"]) == 0
    assert "# --preset tiny --task lr" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_script_that_was_called(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/looped-fast", command, "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert f"usage: looped-fast {command} " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_flags(command):
    done = run_python("-m", MODULES[command], "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m {MODULES[command]}" in done.stdout


def test_the_script_trains(script, tmp_path):
    done = run_python(script, "train", *MINI, "--steps", "2", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 steps" in done.stdout
    assert (tmp_path / "run" / "results.json").exists()


def test_the_script_and_the_package_exit_with_the_status_of_main(script, tmp_path):
    unknown = run_python(script, "tran", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("error: unknown command 'tran'")
    assert run_python("-m", "looped_fast", "tran").returncode == 2


def test_python_m_names_the_module_of_a_command():
    done = run_python("-m", "looped_fast", "state_probes", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: python -m looped_fast.state_probes " in done.stdout
