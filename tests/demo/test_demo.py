"""The demo's data, its page as text, and the command's flags; test_demo_page.py opens the page."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from looped_fast import pretrained
from looped_fast.config import VERSION
from looped_fast.demo.__main__ import main
from looped_fast.demo.page import page
from looped_fast.demo.scenes import CURVE, PLANE, draw, evaluate, grid, pack, predict

LOOPS, PROMPTS, SEED = 13, 2, 5
VIEWS = pytest.mark.parametrize(("name", "view"), [("curve", CURVE), ("plane", PLANE)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "page.html"
    flags = ["--seed", SEED, "--prompts", PROMPTS, "--max-loops", LOOPS, "--out", out]
    assert main([*map(str, flags)]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def unpacked(packed):
    """The numbers that ``pack`` packed, within half a level."""
    whole = np.frombuffer(base64.b64decode(packed["base64"]), f"<u{packed['bits'] // 8}")
    share = torch.from_numpy(whole.astype(np.float64)) / (2 ** packed["bits"] - 1)
    return packed["low"] + share * (packed["high"] - packed["low"])


class Loads(HTMLParser):
    """Every attribute with an address, by element; what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, n, v) for n, v in attrs if n in ("src", "href", "srcset", "data")]


def test_the_page_loads_nothing(text):
    assert [(tag, name) for tag, name, _ in Loads(text).found] == [("a", "href")]  # the paper
    assert len(re.findall(r"https?:", text)) == 1
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)


def test_the_page_says_how_it_was_made(data):
    assert data["version"] == VERSION
    assert data["command"] == (
        f"python -m looped_fast.demo --seed {SEED} --prompts {PROMPTS} --max-loops {LOOPS}"
    )


@VIEWS
def test_the_data_are_predictions_of_the_shipped_model(data, name, view):
    scene, config = data[name], pretrained.train_config(view.name)
    b, n = config.n_loops, config.n_points - 1
    assert (scene["model"], scene["n_loops"], scene["n_examples"]) == (view.name, b, n)
    assert len(scene["average"]) == LOOPS
    assert len(scene["prompts"]) == PROMPTS
    task, queries = config.make_task(), grid(view, config.n_dims)
    for prompt in scene["prompts"]:
        xs, ys = torch.tensor(prompt["xs"]), torch.tensor(prompt["ys"])
        assert xs.shape == (n, config.n_dims)
        low, high = prompt["span"]
        level = (high - low) / (2**view.bits - 1)
        truth = unpacked(prompt["truth"])
        assert len(truth) == len(queries) == view.side**config.n_dims
        predictions = unpacked(prompt["predictions"]).view(LOOPS, -1)
        model = pretrained.from_pretrained(view.name, backend="reference")
        expected = predict(model, xs[None], ys[None], queries, LOOPS)[:, 0].clip(low, high)
        # Examples are rounded to 4 digits, and the loop amplifies that.
        assert (predictions - expected).abs().mean(1).max() < level + 0.01 * (high - low)
        error = (expected[b - 1].double() - truth).square().mean() / task.variance
        assert prompt["errors"][b - 1] == pytest.approx(error.item(), rel=0.2, abs=1e-3)
        assert prompt["errors"][b - 1] < prompt["errors"][0]


@VIEWS
def test_the_loops_lower_the_error_of_other_prompts(data, name, view):
    average = data[name]["average"]
    b = data[name]["n_loops"]
    assert average[b - 1] < 0.1 < average[0]
    assert (
        f"after {b} loops: {average[b - 1]:#.2g}; after {LOOPS}: {average[-1]:#.2g}."
        in (data[name]["note"])
    )


def test_the_queries_of_a_plane_are_its_pixels_row_by_row_from_the_top():
    queries = grid(PLANE._replace(side=4, span=(-2.0, 2.0)), 2)
    assert queries[0].tolist() == [-1.5, 1.5]
    assert queries[3].tolist() == [1.5, 1.5]
    assert queries[-1].tolist() == [1.5, -1.5]


@VIEWS
def test_the_examples_are_values_of_the_true_function(name, view):
    config = pretrained.train_config(view.name)
    task = config.make_task()
    xs, ys, function = draw(task, 3, 7, seed=1)
    at_its_own = evaluate(task, xs[1], function)[1]
    torch.testing.assert_close(at_its_own, ys[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(xs, draw(task, 3, 7, seed=2)[0])


@pytest.mark.parametrize("bits", [8, 16])
def test_packed_numbers_are_within_half_a_level(bits):
    values = torch.linspace(-3, 3, 1001)
    found = unpacked(pack(values, -2.0, 2.0, bits))
    half = 2 / (2**bits - 1)
    assert (found - values.double().clip(-2, 2)).abs().max() <= half * (1 + 1e-6)
    assert found[0] == -2
    assert found[-1] == 2


def test_a_page_ends_no_element_early_and_takes_no_nan():
    text = page({"curve": "</script><b>&"})
    assert "</script><b>" not in text
    assert '{"curve":"\\u003c/script>\\u003cb>&"}' in text.replace(">\\u003cb", ">\\u003cb")
    with pytest.raises(ValueError, match="not JSON compliant"):
        page({"error": float("nan")})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "0"], "prompts = 0: at least 1 is needed"),
        (["--seed", "-1"], "seed = -1: at least 0 is needed"),
        (["--max-loops", "5"], "max_loops = 5: fourier-1d-small was trained with 12 loops, and at"),
        (["--prompts", "50"], "make 1800 pictures of each model, and at most 600 fit in the page"),
        (["--out", "missing/page.html"], "missing/page.html"),
        (["--out", "."], "is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_exit_2_and_write_nothing(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_gets_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--promts", "3"])
    assert stop.value.code == 2
    assert "did you mean --prompts?" in capsys.readouterr().err


def test_a_page_of_default_flags_is_below_two_megabytes():
    """Two thirds are colours: a byte a pixel, as base64."""
    pictures = 6 * 36 * (PLANE.side**2 + 2 * CURVE.side) * 4 / 3
    assert pictures < 1e6
