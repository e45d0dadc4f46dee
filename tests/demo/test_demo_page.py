"""The demo's page in a real Chromium: what a reader sees, clicks and types."""

from __future__ import annotations

import functools
import re

import browsers
import pytest
import torch

import looped_fast
from looped_fast import pretrained
from looped_fast.demo.__main__ import main
from looped_fast.demo.scenes import AVERAGED, CURVE, PLANE, draw, evaluate, grid

LOOPS, PROMPTS, SEED = 14, 2, 3

NO_BROWSER = browsers.missing()
pytestmark = pytest.mark.skipif(NO_BROWSER is not None, reason=str(NO_BROWSER))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "a page.html"
    flags = ["--seed", SEED, "--prompts", PROMPTS, "--max-loops", LOOPS, "--out", out]
    assert main([*map(str, flags)]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium() as started:
        yield started


def recorded(page):
    """What a page requests, and its errors."""
    found = []
    page.on("request", lambda request: found.append(request.url))
    page.on("console", lambda m: found.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


@pytest.fixture
def page(browser, page_file):
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    found = recorded(page)
    page.goto(page_file.as_uri())
    yield page
    assert found == [page_file.as_uri()]
    page.close()


def shown(page):
    """What the page draws now: step, curve, heat map, markers and errors of both scenes."""
    of = page.locator
    return {
        "step": of("#step").text_content(),
        "curve": of("#curve .now").get_attribute("d"),
        "dots": of("#curve .example").evaluate_all("all => all.map(one => one.outerHTML)"),
        "map": of("#plane .model canvas").evaluate("canvas => canvas.toDataURL()"),
        "truth": of("#plane .true canvas").evaluate("canvas => canvas.toDataURL()"),
        "markers": of(".marker").evaluate_all("all => all.map(one => one.outerHTML)"),
        "errors": of(".value").all_text_contents(),
    }


def changes(before, after):
    return {name for name in before if before[name] != after[name]}


def test_the_recorder_sees_requests_and_errors(browser, tmp_path):
    """Else a page that loads things, or fails, would pass the fixture above."""
    (tmp_path / "bad.html").write_text(
        "<img src='nowhere.png'><script>console.error('said'); undefined.x</script>",
        encoding="utf-8",
    )
    page = browser.new_page()
    found = recorded(page)
    page.goto((tmp_path / "bad.html").as_uri())
    page.close()
    assert {"said", (tmp_path / "nowhere.png").as_uri()} < set(found)
    assert any("undefined" in text for text in found)


def test_the_slider_changes_step_curve_map_and_markers(page):
    first = shown(page)
    assert first["step"] == "1"
    page.locator("#loop").fill("9")
    ninth = shown(page)
    assert ninth["step"] == "9"
    assert changes(first, ninth) == {"step", "curve", "map", "markers", "errors"}
    page.locator("#loop").fill("1")
    assert shown(page) == first


def test_the_map_shows_the_true_tree_once_the_loops_have_converged(page):
    def difference():
        """Mean difference of the two maps' colours, of 255."""
        return page.evaluate(
            """() => {
                const [model, truth] = ["model", "true"].map((name) => {
                    const canvas = document.querySelector(`#plane .${name} canvas`);
                    const { width, height } = canvas;
                    return canvas.getContext("2d").getImageData(0, 0, width, height).data;
                });
                return model.reduce((sum, v, i) => sum + Math.abs(v - truth[i]), 0) / model.length;
            }"""
        )

    at_first = difference()
    page.locator("#loop").fill("12")
    assert difference() < at_first / 2


@functools.cache
def errors_of_first_prompt(view):
    """After b loops, with a prompt for every query, as the model was trained."""
    model, config = looped_fast.from_pretrained(view.name), pretrained.train_config(view.name)
    task, queries = config.make_task(), grid(view, config.n_dims)
    n, b = config.n_points - 1, config.n_loops
    xs, ys, function = draw(task, PROMPTS + AVERAGED, n, SEED)
    truth = evaluate(task, queries, function)[0]
    prompts = torch.cat((xs[0].expand(len(queries), -1, -1), queries[:, None]), 1)
    values = torch.cat((ys[0].expand(len(queries), -1), torch.zeros(len(queries), 1)), 1)
    with torch.no_grad():
        predictions = torch.cat(
            [
                model(x, y, b, 1)[-1, :, -1]
                for x, y in zip(prompts.split(256), values.split(256), strict=True)
            ]
        )
    return (predictions - truth).square().mean().item() / task.variance


@pytest.mark.parametrize("view", [CURVE, PLANE], ids=["curve", "plane"])
def test_the_error_on_show_is_that_of_one_prompt_per_query(page, view):
    b = pretrained.train_config(view.name).n_loops
    page.locator("#loop").fill(str(b))
    text = page.locator(f"#{'curve' if view is CURVE else 'plane'} .value").text_content()
    assert re.fullmatch(r"[\d.]+(e-\d+)?", text)
    # Three digits are shown.
    assert float(text) == pytest.approx(errors_of_first_prompt(view), rel=0.006)


def test_another_prompt_changes_examples_and_predictions(page):
    first = shown(page)
    page.locator("#prompts label", has_text="2").click()
    second = shown(page)
    assert changes(first, second) == set(first) - {"step"}
    page.locator("#prompts label", has_text="1").click()
    assert shown(page) == first


def test_play_runs_to_the_last_loop_and_stops_there(page):
    page.locator("#loop").fill(str(LOOPS - 2))
    button = page.locator("#play")
    assert button.text_content() == "Play"
    button.click()
    assert button.text_content() == "Pause"
    page.wait_for_function(f"document.getElementById('step').textContent === '{LOOPS}'")
    assert button.text_content() == "Play"
    button.click()  # from the start again
    assert page.locator("#step").text_content() == "1"


def test_pause_stops_where_it_is(page):
    button = page.locator("#play")
    button.click()
    page.wait_for_function("Number(document.getElementById('step').textContent) >= 2")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    step = page.locator("#step").text_content()
    page.wait_for_timeout(900)
    assert page.locator("#step").text_content() == step


def test_all_of_it_works_from_the_keyboard(page):
    step = page.locator("#step")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator("#play").text_content() == "Pause"
    page.keyboard.press("Tab")
    page.keyboard.press("End")  # a hand on the slider stops the playing
    assert (page.locator("#play").text_content(), step.text_content()) == ("Play", str(LOOPS))
    page.keyboard.press("Home")
    assert step.text_content() == "1"
    for key, at in (("ArrowRight", "2"), ("ArrowUp", "3"), ("ArrowLeft", "2"), ("End", str(LOOPS))):
        page.keyboard.press(key)
        assert step.text_content() == at
    before = shown(page)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("Prompt 2").is_checked()
    assert "dots" in changes(before, shown(page))


def test_dark_mode_has_colours_of_its_own(page):
    light = shown(page), page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    dark = shown(page), page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert changes(light[0], dark[0]) == {"map", "truth"}
    assert light[1] != dark[1]


def test_a_phone_shows_it_without_scrolling_sideways(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function(  # drawn anew, at its new width
        """() => {
            const plot = document.querySelector("#curve .plot");
            return plot.clientWidth < 390 && plot.viewBox.baseVal.width === plot.clientWidth;
        }"""
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    parts = ("#play", "#loop", "#prompts", "#curve", "#plane")
    places = [page.locator(part).bounding_box() for part in parts]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in places)
