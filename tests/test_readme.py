"""The README's examples run, and its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from looped_fast.train import parse

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    shlex.split(line.partition("-m looped_fast.train")[2], comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if "-m looped_fast.train" in line
]


@pytest.mark.parametrize("example", EXAMPLES, ids=["api", "trained", "accelerate", "official"])
def test_the_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if not {"--resume", "--config", "--help"} & set(c)],
    ids=" ".join,
)
def test_the_commands_parse(command):
    parse(command)


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) == 4
    assert len(COMMANDS) == 8
