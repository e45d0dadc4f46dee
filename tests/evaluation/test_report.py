from __future__ import annotations

import pytest
import torch

from looped_fast.evaluation.report import error_table, plot

ERRORS = {
    "looped, 8 loops": torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64),
    "least squares": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
}


def test_the_table_shows_middle_and_last_position_of_each():
    header, rule, *rows = error_table(ERRORS).splitlines()
    assert header.split("  ")[0] == "squared error / variance"
    assert "after 1 examples" in header
    assert header.rstrip().endswith("after 2")
    assert set(rule) <= set("- ")
    assert [row.split()[-2:] for row in rows] == [["0.5000", "0.2500"], ["0.0000", "0.0000"]]
    assert [row.startswith(name) for row, name in zip(rows, ERRORS, strict=True)] == [True, True]


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "relative_error": 0.9}, {"step": 1, "errors": {}}, {"step": 2}],
    ],
)
def test_the_plot_is_a_png_of_readable_size(tmp_path, history):
    path = tmp_path / "report.png"
    plot(path, history, ERRORS, "title")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width >= 1000
    assert height >= 400


def test_the_plot_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    plot(tmp_path / "report.png", [], ERRORS, "title")
    assert (tmp_path / "report.png").stat().st_size > 0
