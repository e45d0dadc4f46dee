"""Tasks that a user defines: their options, variance, points and baselines; names and paths."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
import torch
from polynomials import Polynomials

from looped_fast.evaluation.baselines import figure_baselines, quick_baselines
from looped_fast.evaluation.shifts import sample_shifted
from looped_fast.tasks import (
    TASKS,
    LinearRegression,
    Task,
    allow_task_import,
    find_task,
    make_task,
    randn,
    sample_batch,
    task_label,
    task_name,
    task_options,
)

HERE = __name__


class Lines(LinearRegression):
    """No annotations, so no decorator is needed."""


@dataclass(frozen=True)
class Uniform(Lines):
    """Options of every type; x ~ U(-1, 1), scaled."""

    scale: float
    kernel: Literal["flat", "round"] = "flat"
    label: str | None = None
    limit: Optional[int] = None  # noqa: UP045
    fast: bool = False
    inner: dict[str, Any] = field(default_factory=dict)

    def points(self, n_prompts, n_points, generator):
        shape = (n_prompts, n_points, self.n_dims)
        return self.scale * (2 * torch.rand(shape, generator=generator) - 1)


class Forgotten(LinearRegression):
    degree: int = 3


@dataclass(frozen=True)
class Incomplete(Task):
    def draw(self, n_prompts, n_points, generator):
        return {}


@dataclass(frozen=True)
class Constant(Task):
    value: float = 0.0

    def draw(self, n_prompts, n_points, generator):
        return {"c": torch.full((n_prompts, 1), self.value)}

    def evaluate(self, xs, c):
        return c.expand(-1, xs.shape[1])


@dataclass(frozen=True)
class Listed(LinearRegression):
    widths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Unresolved(LinearRegression):
    width: Undefined = 3  # noqa: F821


@dataclass(frozen=True)
class Misnamed(LinearRegression):
    known_baselines = ("least square",)


class Outer:
    class Inner(LinearRegression):
        pass


def test_the_variance_is_measured_where_a_class_does_not_state_it():
    """x^k of N(0, 1) has E[x^2k] = 1, 3, 15 for k = 1, 2, 3."""
    task = Polynomials(4, degree=2)
    assert task.variance == pytest.approx(4 * (1 + 3), rel=0.02)
    assert Polynomials(4, degree=2).variance == task.variance  # of a fixed seed
    assert Polynomials(4, degree=1).variance == pytest.approx(4, rel=0.02)
    assert Constant(2, value=3.0).variance == 9


def test_the_variance_is_measured_once(monkeypatch):
    task = Polynomials(4)
    first = task.variance
    monkeypatch.setattr(Polynomials, "draw", None)
    assert task.variance == first
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Constant(2, value=1.0).variance  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_variance_that_nothing_can_be_divided_by_is_refused(value):
    with pytest.raises(ValueError, match=r"Constant\(n_dims=2, .* was measured as .* state the va"):
        Constant(2, value=value).variance  # noqa: B018


def test_a_task_draws_its_own_points():
    task = Uniform(3, scale=2.0)
    xs, ys = sample_batch(task, 500, 8, seed=0, step=0)
    assert 1.9 < xs.abs().max() <= 2
    assert ys.shape == (500, 8)
    assert task.variance == 3  # stated by LinearRegression, for other points
    shifted = sample_shifted("inputs x 2", task, 500, 8, seed=0)
    assert 3.8 < shifted.xs.abs().max() <= 4


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("points", lambda xs: xs[:, :4], r"Lines.points gave xs of shape \[8, 4, 3\]; \[8, 5, 3\]"),
        ("draw", lambda f: {"w": f["w"][:1]}, r"draw gave w of shape \[1, 3, 1\]; \[8, 3, 1\]"),
        ("evaluate", lambda ys: ys[..., None], r"evaluate gave ys of shape \[8, 5, 1\]; \[8, 5\]"),
        ("evaluate", lambda ys: ys.double(), "gave ys of torch.float64; torch.float32, that of xs"),
    ],
)
def test_a_method_that_gives_another_shape_or_dtype_is_named(method, wrong, message, monkeypatch):
    right = getattr(LinearRegression(3), method)
    wrongly = staticmethod(lambda *args, **function: wrong(right(*args, **function)))
    monkeypatch.setattr(Lines, method, wrongly)
    with pytest.raises(ValueError, match=message):
        sample_batch(Lines(3), 8, 5, seed=0, step=0)


def test_evaluations_add_a_tasks_own_baselines():
    task = Polynomials(2)
    xs, ys = sample_batch(task, 16, 12, seed=0, step=0)
    for chosen in (figure_baselines(task), quick_baselines(task)):
        assert {"least squares", "polynomial fit"} <= chosen.keys()
        error = (chosen["polynomial fit"](xs, ys) - ys)[:, 8:].square().mean()
        assert error < 1e-3 * (chosen["least squares"](xs, ys) - ys)[:, 8:].square().mean()
    with pytest.raises(ValueError, match="unknown baseline 'least square'; did you mean 'least sq"):
        figure_baselines(Misnamed(2))


def test_a_task_has_options_of_plain_types():
    given = {"scale": "1e-1", "kernel": "round", "label": "a", "limit": 3, "fast": True}
    task = make_task(f"{HERE}:Uniform", 3, **given)
    assert task == Uniform(3, 0.1, "round", "a", 3, True)
    assert task.options == {**given, "scale": 0.1, "inner": {}}
    assert make_task(f"{HERE}:Uniform", 3, scale=1).options["label"] is None
    assert make_task(f"{HERE}:Lines", 3) == Lines(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs a value of its option scale, .* give --task.scale, or task_options={'scale'"),
        ({"scale": "wide"}, "task.scale = 'wide': float is needed"),
        ({"scale": 1, "kernel": "flatt"}, "value of setting task.kernel, 'flatt'; did you mean 'f"),
        ({"scale": 1, "label": 3}, "task.label = 3: str is needed"),
        ({"scale": 1, "limit": "3"}, "task.limit = '3': int is needed"),
        ({"scale": 1, "fast": 1}, "task.fast = 1: bool is needed"),
        ({"scale": 1, "inner": 3}, "task.inner = 3: dict is needed"),
        ({"scale": 1, "kernal": "flat"}, "unknown option of task .* did you mean 'kernel'"),
    ],
)
def test_a_wrong_or_missing_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_task(f"{HERE}:Uniform", 3, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Forgotten", r"Forgotten.degree is annotated, .* put @dataclass\(frozen=True\) before"),
        ("Incomplete", r"is incomplete: define its evaluate \(docs/tasks.md\)"),
        ("Task", "is incomplete: define its draw, evaluate"),
        ("Listed", r"option widths .* is a list\[int\]; files and flags hold int, float"),
        ("Unresolved", r"annotation that can't be resolved \(name 'Undefined'"),
        ("HERE", "is no Task but a str; name a subclass of looped_fast.tasks.Task"),
        ("Outer", "is no Task but class Outer"),
        ("make_task", "is no Task but a function"),
        ("Line", "module .* has no Line; the tasks there are .*Lines, Uniform"),
        ("Outer.Iner", "has no Outer.Iner"),
    ],
)
def test_what_is_no_complete_task_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_task(f"{HERE}:{name}", 3)


def test_a_forgotten_decorator_is_named_when_the_class_is_called():
    with pytest.raises(ValueError, match=r"put @dataclass\(frozen=True\) before class Forgotten"):
        Forgotten(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lrr",
            "unknown task 'lrr'; did you mean 'lr'.* or a path such as mypackage.module:MyTask",
        ),
        ("package.module.MyTask", "for a class in a module, write package.module:MyTask"),
        ("tasks.py:MyTask", r"no path: a module's name \(not a file's\)"),
        ("some/tasks:MyTask", "no path"),
        (":MyTask", "no path"),
        ("module:", "no path"),
        ("..module:MyTask", "no path"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_task(name)
    with allow_task_import(), pytest.raises(ValueError, match=message):
        find_task(name)


def test_names_of_classes_are_found_again():
    for task in (Lines, Uniform, Outer.Inner, Polynomials, LinearRegression):
        assert find_task(task_name(task)) is task
    assert task_name(Outer.Inner) == f"{HERE}:Outer.Inner"
    assert task_name(LinearRegression) == "lr"
    assert task_label(task_name(Outer.Inner)) == "Inner"
    assert task_options(task_name(Polynomials)) == ["degree"]


def test_a_class_in_a_function_has_no_name():
    class Local(LinearRegression):
        pass

    with pytest.raises(
        ValueError, match="Local is defined in a function, where a checkpoint can't"
    ):
        task_name(Local)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module with a task and a side effect on import; (its name, the effect's file)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    effect = tmp_path / "effect"

    def write(name, text="", package=None):
        folder = tmp_path if package is None else tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(
            f"open({str(effect)!r}, 'a').write('!')\n"
            f"from looped_fast.tasks import LinearRegression\n"
            f"class Mine(LinearRegression): pass\n{text}",
            encoding="utf-8",
        )
        return effect

    yield write
    for name in [name for name in sys.modules if name.startswith("module_of_")]:
        del sys.modules[name]


def test_a_path_imports_nothing_by_itself(module):
    effect = module("module_of_mine")
    with pytest.raises(
        ValueError,
        match=r"module module_of_mine, which is not imported; .* import module_of_mine first, or "
        r"give --allow-task-import .*allow_task_import\(\)",
    ):
        find_task("module_of_mine:Mine")
    assert not effect.exists()
    with allow_task_import():
        task = find_task("module_of_mine:Mine")
    assert effect.read_text() == "!"
    assert find_task("module_of_mine:Mine") is task  # imported now
    assert make_task("module_of_mine:Mine", 3) == task(3)


def test_a_mixture_imports_nothing_by_itself(module):
    effect = module("module_of_mine")
    with pytest.raises(ValueError, match=r"first = 'module_of_mine:Mine': .* is not imported"):
        make_task("mixture", 3, first="module_of_mine:Mine")
    nested = {"second": "module_of_mine:Mine"}
    with pytest.raises(ValueError, match=r"second = 'module_of_mine:Mine': .* is not imported"):
        make_task("mixture", 3, second="mixture", second_options=nested)
    assert not effect.exists()
    with allow_task_import():
        make_task("mixture", 3, first="module_of_mine:Mine")
    assert effect.exists()


def test_a_lookup_runs_no_code_of_a_module_that_is_imported(module):
    """A module's ``__getattr__`` may import what it likes."""
    effect = module("module_of_more")
    module("module_of_mine", "def __getattr__(name):\n    import module_of_more\n")
    with allow_task_import():
        find_task("module_of_mine:Mine")
    with pytest.raises(ValueError, match="has no Other; the tasks there are Mine"):
        find_task("module_of_mine:Other")
    assert effect.read_text() == "!"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "module module_of_mine fails on import, ZeroDivisionError: division by zero"),
        ("import module_of_none", "fails on import, ModuleNotFoundError: No module named 'module_"),
        ("raise SystemExit(3)", "fails on import, SystemExit: 3; correct it"),
        ("def f(:", "fails on import, SyntaxError"),
    ],
)
def test_a_module_that_fails_on_import_is_named(module, text, message):
    module("module_of_mine", text)
    with allow_task_import(), pytest.raises(ValueError, match=message):
        find_task("module_of_mine:Mine")


@pytest.mark.parametrize("name", ["module_of_none:Mine", "module_of_package.none:Mine"])
def test_a_module_that_does_not_exist_is_named(module, name):
    module("there", package="module_of_package")
    missing = name.partition(":")[0]
    with allow_task_import(), pytest.raises(ValueError, match=f"no module {missing}; start from"):
        find_task(name)


def test_a_module_in_a_package_is_found_from_the_working_directory(module):
    module("there", package="module_of_package")
    with allow_task_import():
        assert find_task("module_of_package.there:Mine").__module__ == "module_of_package.there"


def test_the_page_shows_the_example_that_is_tested():
    root = Path(__file__).parents[2]
    example = (root / "tests" / "tasks" / "polynomials.py").read_text(encoding="utf-8")
    page = (root / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert f"```python\n{example}```\n" in page
    lines = [line for line in example.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 15
    for name in TASKS:
        assert f"| `{name}` |" in page


def test_the_default_points_have_the_bits_of_before():
    generator = torch.Generator().manual_seed(4)
    xs = LinearRegression(3).points(2, 5, generator)
    assert torch.equal(xs, randn(2, 5, 3, generator=torch.Generator().manual_seed(4)))
