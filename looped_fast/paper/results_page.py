"""The page of results: numbers of ``reproduce.py`` beside the published values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from looped_fast.errors import read_json
from looped_fast.evaluation.figures import OFFICIAL_LOOPS
from looped_fast.paper import openml, published, state_probes, sweep
from looped_fast.paper.tabular_data import OPENML_IDS

Numbers = dict[str, Any]

TASKS = {
    "lr": "Linear regression",
    "sparse_lr": "Sparse linear regression",
    "dt": "Decision trees",
    "relu_2nn": "2-layer ReLU networks",
}

# Dense bf16 peaks of the vendor's data sheets, in FLOP/s, and the share of them that a prediction
# assumes: no GPU has run this package yet.
GPU_PEAKS = {"A100 SXM": 312e12, "H100 SXM": 989e12}
ASSUMED_SHARE = 0.2


_PARTS = ("key", "positions", "loops", "shifts", "sweeps", "runs", "experiments", "steps")


def numbers_file(out: Path, name: str) -> Path:
    """Where ``reproduce`` writes the numbers of a figure."""
    return out / "results" / f"{name}.json"


def read_numbers(out: Path, name: str) -> Numbers:
    """The numbers that ``reproduce`` wrote for a figure; empty if there are none.

    Raises:
        ValueError: the file is no JSON object, or one of its parts isn't.
    """
    path = numbers_file(out, name)
    numbers = read_json(path) if path.exists() else {}
    with as_written(path):
        for part in _PARTS:
            if not isinstance(numbers.get(part, {}), dict):
                raise TypeError(f"{part} is a {type(numbers[part]).__name__}")
    return numbers


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turn the error of code that meets something unexpected in ``path`` into one that names it."""
    try:
        yield
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold what looped_fast wrote there ({error!r}); delete it, and repeat "
            f"the command that makes it"
        ) from error


def scale(numbers: Numbers) -> str:
    """The size of the task that a figure's models learned."""
    (settings, *_) = numbers["key"]["models"].values()
    depth = f", depth {settings['depth']}" if settings["depth"] else ""
    return f"d = {settings['n_dims']}{depth}"


def write_page(out: Path) -> None:
    """Write ``<out>/results.md`` from the numbers that exist."""
    sections = {}
    for name, render in SECTIONS.items():
        numbers = read_numbers(out, name)
        with as_written(numbers_file(out, name)):
            sections[name] = render(numbers)
    with as_written(out / "results"):
        parts = [_INTRODUCTION, _claims(out)]
    for name, text in sections.items():
        missing = read_numbers(out, name).get(
            "missing", [f"python -m looped_fast.reproduce {name}"]
        )
        if missing:
            text += "\n\nMissing here; made by:\n\n" + "\n".join(f"    {how}" for how in missing)
        parts.append(f"## {_TITLES[name]}\n\n{text.strip()}")
    (out / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


_INTRODUCTION = """\
# Results beside the paper's

Written by `python -m looped_fast.reproduce`; do not edit. Published values are those of
arXiv 2311.12424v3 and of the outputs of the official notebooks, at d = 20, D = 256 and 500,000
training steps. Ours are of the models that ship with the package, which two CPU cores trained in
minutes, unless a section says otherwise: they are a check of the claims, not of the numbers.
`python -m looped_fast.reproduce --preset paper --train --work paper --out paper` trains and
evaluates the paper's own settings. Errors are squared errors over the variance of y (for linear
regression: over d), as in the paper; predicting zero scores 1."""


def _claims(out: Path) -> str:
    rows: list[tuple[str, str, float | None, bool | None]] = []
    lr, sparse, dt, relu = (read_numbers(out, task) for task in TASKS)
    if {"looped", "standard"} <= lr.get("positions", {}).keys():
        looped, standard = (_last(lr, who) for who in ("looped", "standard"))
        rows.append(
            ("lr: looped at most 2 x standard", f"{looped:.4f} and {standard:.4f}",
             _far(lr, "lr"), looped <= 2 * standard)
        )  # fmt: skip
        low, high = (lr["positions"]["looped"][end][-1] for end in ("low", "high"))
        is_open = low <= 0.01 <= high
        rows.append(
            ("lr: looped at most 0.01", f"{looped:.4f} ({low:.4f} to {high:.4f})",
             _far(lr, "lr"), None if is_open else looped <= 0.01)
        )  # fmt: skip
    if "loops" in lr:
        b, errors = lr["key"]["models"]["looped"]["n_loops"], _loop_errors(lr)
        for times in (2, 10):
            ratio = errors[times * b - 1] / errors[b - 1]
            rows.append(
                (f"lr: error at {times}b at most 2 x that at b", f"{ratio:.2f} x", None, ratio <= 2)
            )
    if "looped" in sparse.get("positions", {}):
        half = sparse["key"]["models"]["looped"]["n_dims"] // 2
        looped, exact = (
            sparse["positions"][who]["mean"][half] for who in ("looped", "least squares")
        )
        rows.append(
            ("sparse_lr: looped below least squares after d/2 examples",
             f"{looped:.3f} and {exact:.3f}", _far(sparse, "sparse_lr", half), looped < exact)
        )  # fmt: skip
    for numbers, task, other, factor in (
        (dt, "dt", "3-nearest neighbours", 1.0),
        (dt, "dt", "XGBoost, signs", 1.0),
        (relu, "relu_2nn", "2-layer network", 1.1),
    ):
        if {"looped", other} <= numbers.get("positions", {}).keys():
            looped, theirs = _last(numbers, "looped"), _last(numbers, other)
            claim = f"{task}: looped {'below' if factor == 1 else 'at most 1.1 x'} {other}"
            found = f"{looped:.3f} and {theirs:.3f}"
            rows.append((claim, found, _far(numbers, task), looped <= factor * theirs))
    has_recipes = (out / "recipes.md").exists()  # only beside the page of the shipped models
    verdicts = {
        True: "yes",
        False: "**no**" + "; [curves of the recipes tried](recipes.md)" * has_recipes,
        None: "open: the 5-95 % band spans it",
    }
    table = [(claim, found, far, verdicts[holds]) for claim, found, far, holds in rows]
    headers = ["claim (last position)", "here, b loops", "looped, 500 loops (dt 200)", "holds here"]
    return f"## Claims\n\n{_table(table, headers)}"


def _far(numbers: Numbers, task: str, position: int = -1) -> float | None:
    """Error of the looped model at the loop count of the published one, if measured."""
    curve = numbers["positions"].get(f"looped, {OFFICIAL_LOOPS[task]} loops")
    return curve and curve["mean"][position]


def _last(numbers: Numbers, who: str) -> float:
    return numbers["positions"][who]["mean"][-1]


def _loop_errors(numbers: Numbers) -> list[float]:
    return numbers["loops"]["curves"]["looped"]["mean"]


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str], digits: int = 4) -> str:
    return tabulate(rows, headers, tablefmt="github", floatfmt=f".{digits}f", missingval="")


def _provenance(numbers: Numbers) -> str:
    key = numbers["key"]
    models = "; ".join(
        f"{who}: D = {m['n_embd']}, {m['n_layer']} block{'s' * (m['n_layer'] > 1)}"
        + (f", b = {m['n_loops']}, T = {m['window']}" if m["n_loops"] > 1 else "")
        + f", {m['parameters'] / 1e6:.2f}M parameters, {m['step']:,} steps"
        + (f" of {m['steps']:,}" if m["step"] < m["steps"] else "")
        + f", sha256 {m['sha256'][:12]}"
        for who, m in key["models"].items()
    )
    versions = _versions(key.get("baselines", key)["versions"])
    return f"{scale(numbers)}, {key['prompts']} prompts, seed {key['seed']}; {models}; {versions}."


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _task_section(task: str) -> Callable[[Numbers], str]:
    def render(numbers: Numbers) -> str:
        if "positions" not in numbers:
            return _published(task)
        d = next(iter(numbers["key"]["models"].values()))["n_dims"]
        n = len(next(iter(numbers["positions"].values()))["mean"])
        places = [i for i in dict.fromkeys((d // 2, d, 2 * d, n - 1)) if i < n]
        headers = ["squared error / variance", *(f"after {i}" for i in places)]
        rows = []
        for who, curve in numbers["positions"].items():
            cells = [
                f"{curve['mean'][i]:.4f} ({curve['low'][i]:.4f} to {curve['high'][i]:.4f})"
                for i in places
            ]
            rows.append([who, *cells])
        parts = [f"![{task}](results/{task}.png)", _provenance(numbers), _table(rows, headers)]
        parts += [_published(task), _order(task, numbers)]
        if "loops" in numbers:
            b, errors = numbers["key"]["models"]["looped"]["n_loops"], _loop_errors(numbers)
            counts = [i for i in dict.fromkeys((b // 2, b, 2 * b, 10 * b, len(errors))) if i >= 1]
            table = _table([[errors[i - 1] for i in counts]], [f"{i} loops" for i in counts])
            prompts = f"{numbers['loops']['prompts']} prompts"
            what = f"Looped further than trained (b = {b}), at the last position, {prompts}"
            parts.append(f"{what}:\n\n{table}")
        return "\n\n".join(filter(None, parts))

    return render


def _published(task: str) -> str:
    """The printed curves as a table, and what was read off a figure as a sentence."""
    parts = []
    if task in published.CURVES:
        curves = published.CURVES[task]
        places = [i for i in (10, 20, 40, 100) if i < len(curves["looped"])]
        rows = [[who, *(curve[i] for i in places)] for who, curve in curves.items()]
        parts.append(_table(rows, ["published, d = 20", *(f"after {i}" for i in places)]))
    if task in published.READ_OFF:
        read = (f"{who} about {error}" for who, error in published.READ_OFF[task].items())
        parts.append(
            f"Read off the published figure, after 100 examples (d = 20, "
            f"{published.READ_OFF_SCALE[task]}): {'; '.join(read)}."
        )
    parts.append(f"Published errors of looped models are after {OFFICIAL_LOOPS[task]} loops.")
    return "\n\n".join(parts)


_BEST_CLASSICAL = {
    "lr": "least squares",
    "sparse_lr": "lasso",
    "dt": "XGBoost, signs",
    "relu_2nn": "2-layer network",
}


def _order(task: str, numbers: Numbers) -> str:
    """A sentence that compares the order of models and best classical algorithm here."""
    printed = {who: curve[-1] for who, curve in published.CURVES.get(task, {}).items()}
    theirs = printed or published.READ_OFF[task]  # not both: read-off values are approximate
    ours = {who: curve["mean"][-1] for who, curve in numbers["positions"].items()}
    far = _far(numbers, task)
    if far is not None:
        ours["looped"] = far
    both = {*openml.MODELS, _BEST_CLASSICAL[task]} & theirs.keys() & ours.keys()
    if len(both) < 2:
        return ""
    first, order = (" < ".join(sorted(both, key=errors.__getitem__)) for errors in (theirs, ours))
    loops = f", looped after {OFFICIAL_LOOPS[task]} loops" if far is not None else ""
    here = "the same" if order == first else f"**another**, {order}"
    return f"Order at the last position{loops}: published {first}; here {here}."


def _shifts(numbers: Numbers) -> str:
    if "shifts" not in numbers:
        return ""
    shifts = numbers["shifts"]
    names = list(next(iter(shifts.values())))
    rows = [
        [shift, len(curves[names[0]]["mean"]) - 1, *(curves[who]["mean"][-1] for who in names)]
        for shift, curves in shifts.items()
    ]
    table = _table(rows, ["error / mean square", "after examples", *names])
    return f"![out of distribution](results/ood.png)\n\n{_provenance(numbers)}\n\n{table}"


def _sweeps(numbers: Numbers) -> str:
    parts = []
    for name, result in numbers.get("sweeps", {}).items():
        rows = []
        for label, run in result["runs"].items():
            b, by_loops = run["n_loops"], run["by_loops"]
            far = [by_loops[i * b - 1] if len(by_loops) > 1 else None for i in (2, sweep.FAR)]
            rows.append([label, run["by_position"]["mean"][-1], *far, run["sha256"][:12]])
        headers = ["error at the last position", "b loops", "2b", f"{sweep.FAR}b", "sha256"]
        parts.append(
            f"**{name}**: {result['question']} Scale: {result['scale']}; {result['prompts']} "
            f"prompts, seed {result['seed']}; {_versions(result['versions'])}.\n\n"
            f"![{name}](results/sweep-{name}.png)\n\n{_table(rows, headers)}"
        )
    return "\n\n".join(parts)


def _probes(numbers: Numbers) -> str:
    if "runs" not in numbers:
        return ""
    rows: list[list[Any]] = []
    for who, result in numbers["runs"].items():
        for target in state_probes.TARGETS:
            errors = result["probes"][target]["relative"]
            control = min(result["control"][target]["relative"])
            rows.append([f"here, {who}", target, errors[0], *_best(errors), errors[-1], control])
    for target, curves in published.PROBES.items():
        for who, values in curves.items():
            errors = [value / published.PROBES_OF_ZERO[target] for value in values]
            rows.append([f"published, {who}", target, errors[0], *_best(errors), errors[-1], None])
    headers = ["error / zero", "target", "prompt", "best at", "there", "last", "control"]
    settings = numbers["key"]["settings"]
    return (
        f"![probes](results/probes.png)\n\n{_provenance(numbers)} Probes: {settings['steps']:,} "
        f"steps of {settings['batch_size']} prompts (officially 100,000 of 1280). The control is "
        f"trained on one w and tested on others.\n\n{_table(rows, headers, 3)}"
    )


def _best(errors: Sequence[float]) -> tuple[int, float]:
    best = min(range(len(errors)), key=errors.__getitem__)
    return best, errors[best]


def _openml(numbers: Numbers) -> str:
    parts = []
    for name, result in numbers.get("experiments", {}).items():
        settings, sets = result["settings"], result["sets"]
        rows = [[who, *(sets[who][p][0] for p in openml.PREDICTORS)] for who in sets]
        means = [sum(sets[s][p][0] for s in sets) / len(sets) for p in openml.PREDICTORS]
        steps = settings["steps"] or "all"
        parts.append(
            f"**{name}**: preset {settings['preset']}, {steps} steps, accuracy over "
            f"{settings['test_seeds']} seeds; {_versions(result['versions'])}.\n\n"
            f"![{name}](results/openml-{name}.png)\n\n"
            + _table([*rows, ["mean", *means]], ["set held out", *openml.PREDICTORS], 3)
        )
    columns = [[accuracy for accuracy, _ in published.OPENML[who]] for who in openml.MODELS]
    table: list[list[Any]] = [list(row) for row in zip(OPENML_IDS, *columns, strict=True)]
    table.append(["mean", *(sum(column) / len(column) for column in columns)])
    parts.append(_table(table, ["published, set held out", *openml.MODELS], 3))
    return "\n\n".join(parts)


def _speed(numbers: Numbers) -> str:
    if "steps" not in numbers:
        return ""
    key = numbers["key"]
    rows = []
    for name, row in numbers["steps"].items():
        here = row["seconds"] / key["cores"] * row["total_flops"] / row["flops"] / 3600
        gpus = [row["total_flops"] / (peak * ASSUMED_SHARE) / 3600 for peak in GPU_PEAKS.values()]
        rows.append([name, row["seconds"], row["flops"] / 1e12, here, *gpus])
    cores = f"{key['cores']} core{'s' * (key['cores'] > 1)}"
    headers = [
        "paper scale", "s/step and core, measured", "TFLOP/step", f"hours, {cores}", *GPU_PEAKS
    ]  # fmt: skip
    return (
        f"Measured: forward and backward of a training step at the end of the curriculum, on "
        f"{key['hardware']}, fp32, {key['prompts']} prompts scaled to 64 ({numbers['date']}; on a "
        f"CPU, processor time). Hours are **predictions** for all steps with their curriculum: on "
        f"this machine's {cores} from that time, if cores add up; on GPUs from the count of FLOPs "
        f"at {ASSUMED_SHARE:.0%} of the bf16 peak, an assumption that nobody has measured "
        f"(`python -m benchmarks.roofline` predicts from the kernels' counted work).\n\n"
        + _table(rows, headers, 1)
    )


SECTIONS: dict[str, Callable[[Numbers], str]] = {
    **{task: _task_section(task) for task in TASKS},
    "ood": _shifts,
    "ablations": _sweeps,
    "probes": _probes,
    "openml": _openml,
    "speed": _speed,
}
_TITLES = {
    **TASKS,
    "ood": "Out of distribution",
    "ablations": "Ablations",
    "probes": "Probes of the hidden states",
    "openml": "OpenML: a set never seen",
    "speed": "Time at the paper's scale",
}
