"""Examples of README.md and docs/ run, their commands parse, and their links have targets."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest

from looped_fast.train import parse, parse_early
from looped_fast.training.command_line import import_named_tasks
from looped_fast.training.trm import command as trm

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
TESTED_ELSEWHERE = {"docs/evaluation.md", "docs/gpu.md"}  # their examples, next to their tables
EXAMPLES = [
    pytest.param(page, example, id=f"{page}-{number}")
    for page, text in PAGES.items()
    if page not in TESTED_ELSEWHERE
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
]
COMMANDS = [
    shlex.split(line.partition("-m looped_fast.train")[2], comments=True)
    for text in PAGES.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if "-m looped_fast.train" in line
]
LINKS = [
    pytest.param(page, target, id=f"{page}-{target}")
    for page, text in PAGES.items()
    for target in dict.fromkeys(re.findall(r"\]\((?!https?:)([^)]+)\)", text))
]


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_the_examples_run(page, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, page, "exec"), {})


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if not {"--resume", "--config", "--help"} & set(c)],
    ids=" ".join,
)
def test_the_commands_parse(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "tasks")  # of polynomials.py
    import_named_tasks("polynomials:Polynomials")
    chosen = parse_early(command)
    if trm.trains_trm(chosen):
        trm.parse(command, chosen, contextlib.ExitStack())
    else:
        parse(command)


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_the_links_lead_to_a_file_and_a_heading(page, target):
    path, _, anchor = target.partition("#")
    linked = (ROOT / page).parent / path if path else ROOT / page
    assert linked.exists()
    assert not anchor or anchor in anchors(linked.read_text())


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) == 18
    assert len(COMMANDS) == 22
