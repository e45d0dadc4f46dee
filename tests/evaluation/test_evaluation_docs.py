"""The example of docs/evaluation.md runs, its commands parse, and its tables are complete."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from looped_fast.evaluate import Command
from looped_fast.evaluation.baselines import BASELINES
from looped_fast.evaluation.shifts import SHIFTS

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
COMMANDS = re.findall(r"^python -m looped_fast\.evaluate (.*run.*)$", PAGE, re.M)


def test_the_example_runs(capsys):
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "evaluation.md", "exec"), {})
    assert "lasso" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command):
    assert tyro.cli(Command, args=shlex.split(command)).runs


def test_there_are_commands():
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("name", [*BASELINES, *SHIFTS])
def test_the_tables_name_everything(name):
    words = name.split(" x ")[0].split(",")[0]
    assert words in {"zero", "none"} or words in PAGE
