from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looped_fast.training.curriculum import Curriculum, Schedule, Stage
from looped_fast.training.presets import preset_config

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_trace(task):
    return json.loads((GOLDEN / f"curriculum_{task}.json").read_text())


def stages(trace):
    return {s["step"]: Stage(s["n_dims"], s["n_points"], s["n_loops"]) for s in trace["trace"]}


def official_values(start, end, inc, interval, n_steps):
    """Official ``Curriculum.update_var``, called after every step."""
    values, var = [], start
    for step_count in range(1, n_steps + 1):
        values.append(var)
        if step_count % interval == 0:
            var += inc
        var = min(var, end)
    return values


@pytest.mark.parametrize("task", ["lr", "dt"])
def test_schedules_follow_the_official_trace(task):
    trace = golden_trace(task)
    schedules = {name: Schedule(*trace[name]) for name in ("dims", "points", "loops")}
    curriculum = Curriculum(**schedules)
    expected = stages(trace)
    assert {step: curriculum.at(step) for step in expected} == expected


@pytest.mark.parametrize("task", ["lr", "dt"])
def test_the_paper_preset_follows_the_official_trace(task):
    curriculum = preset_config("paper", task).make_curriculum()
    expected = stages(golden_trace(task))
    assert {step: curriculum.at(step) for step in expected} == expected


@given(
    start=st.integers(1, 30),
    growth=st.integers(0, 60),
    inc=st.integers(0, 9),
    interval=st.integers(1, 25),
)
def test_every_schedule_equals_the_official_counting_rule(start, growth, inc, interval):
    end = start + growth
    schedule = Schedule(start, end, inc, interval)
    ours = [schedule.at(step) for step in range(150)]
    assert ours == official_values(start, end, inc, interval, 150)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0, "end": 5}, "start = 0, end = 5: 1 <= start <= end"),
        ({"start": 6, "end": 5}, "start = 6, end = 5: 1 <= start <= end"),
        ({"start": 1, "end": 5, "interval": 0}, "interval = 0: at least 1 step"),
        ({"start": 1, "end": 5, "inc": -1}, "inc = -1: a curriculum can't shrink"),
    ],
)
def test_a_bad_schedule_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)
