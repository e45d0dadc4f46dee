"""docs/gpu.md: its example runs, its commands parse, and its tables are those of the code."""

import json
import re
import shlex
from pathlib import Path

import pytest

from looped_fast.ops import triton_backend
from looped_fast.train import parse

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "gpu.md").read_text()
COMMANDS = re.findall(r"^python -m looped_fast\.train (.*)$", PAGE, re.M)


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "gpu.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command):
    parse(shlex.split(command))


LITTLE_SHARED_MEMORY = "".join(re.findall(r"^\| sm_.*D = 512: `reference`.*$", PAGE, re.M))


def row(name):
    return re.search(rf"^\| {re.escape(name)}.*?\| (.*?) \|", PAGE, re.M)[1]


def test_the_table_of_support_is_that_of_the_backend():
    assert row("width D") == ", ".join(map(str, triton_backend.WIDTHS))
    assert row("head_dim") == ", ".join(map(str, triton_backend.HEAD_DIMS))
    torch = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert row("PyTorch, Triton") == f"{torch}, {triton_backend.MIN_TRITON}"


def test_every_architecture_in_the_table_has_configurations_for_all_sizes():
    architectures = re.findall(r"^\| (sm_\d+) .*compiled", PAGE, re.M)
    assert len(architectures) == 5
    candidates = json.loads((ROOT / "kernels" / "candidates.json").read_text())
    for kernel, widths in {
        "row_forward_kernel": triton_backend.WIDTHS,
        "row_backward_kernel": triton_backend.WIDTHS,
        "after_norm_forward_kernel": triton_backend.WIDTHS,
        "after_norm_backward_kernel": triton_backend.WIDTHS,
        "attention_forward_kernel": triton_backend.HEAD_DIMS,
        "attention_backward_kernel": triton_backend.HEAD_DIMS,
    }.items():
        for architecture in architectures:
            for width in widths:
                for precision in ("fp32", "tf32", "bf16", "fp16"):
                    little = f"| {architecture} |" in LITTLE_SHARED_MEMORY
                    refused = width == 512 and (
                        precision == "tf32" or (precision == "fp32" and little)
                    )
                    found = f"{width} {precision}" in candidates[kernel][architecture]
                    assert found != refused
