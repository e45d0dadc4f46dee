"""``benchmarks.prediction``: what it counts and writes; docs show what was measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import prediction
from looped_fast import from_pretrained
from looped_fast.tasks import make_task, sample_batch

DOCS = Path(__file__).parents[2] / "docs"


def test_a_small_run_writes_results_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction.pretrained, "names", lambda: ["lr-small", "lr-standard-small"])
    sizes = ["--prompts", "8", "--steps", "14", "--queries", "60", "--loops", "2"]
    prediction.main([*sizes, "--repeats", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "prediction.json").read_text(encoding="utf-8"))
    assert {row["backend"] for row in results["queries"]} == {"cpu", "reference"}
    assert [row["model"] for row in results["loops"]] == ["lr-small"]  # the others have no loop
    assert results["loops"][0]["to_trained_error"]["0"] <= 12
    assert {row["prompts"] for row in results["steps"]} == {1, 64}
    assert results["provenance"]["torch"] == torch.__version__
    table = (tmp_path / "prediction.md").read_text(encoding="utf-8")
    assert table == prediction.markdown(
        {**results, "loops": [_with_whole_depths(row) for row in results["loops"]]}
    )


def _with_whole_depths(row):
    """JSON has made texts of the depths."""
    return {
        name: {int(d): v for d, v in value.items()} if isinstance(value, dict) else value
        for name, value in row.items()
    }


@pytest.mark.parametrize("depth", [0, 3])
def test_errors_are_those_after_each_step(depth):
    model = from_pretrained("lr-small")
    xs, ys = sample_batch(make_task("lr", 5), 4, 16, seed=1, step=0)
    errors = prediction.steps_errors(model, xs, ys, 6, depth)
    for n in (1, 2, 6):
        predictions = model.predict(xs, ys, n_loops=n, anderson=depth)
        expected = (predictions - ys)[:, -1].square().mean()
        torch.testing.assert_close(errors[n - 1], expected, rtol=1e-4, atol=1e-5)


def test_never_is_said():
    assert prediction._first(torch.tensor([False, True, True])) == 2
    assert prediction._first(torch.tensor([False, False])) is None
    assert prediction._count(None) == "never"


def test_the_docs_show_the_stored_tables():
    stored = (prediction.RESULTS / "prediction.md").read_text(encoding="utf-8")
    queries, *loops = stored.strip().split("\n\n")
    assert queries in (DOCS / "queries.md").read_text(encoding="utf-8")
    assert len(loops) == 3
    for table in loops:
        assert table in (DOCS / "adaptive.md").read_text(encoding="utf-8")
