"""The tests that docs/around.md names exist, and every row names one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "around.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_the_page_names_is_there(file, name):
    code = (ROOT / file).read_text()
    assert re.search(rf"^def {name or 'test_'}", code, re.MULTILINE)


def test_every_row_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    without = [r for r in rows if "tests/" not in r and "---" not in r and "shown by" not in r]
    assert len(rows) > 30
    assert ["torch.jit.trace" in row for row in without] == [True]
