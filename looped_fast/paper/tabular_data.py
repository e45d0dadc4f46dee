"""Two-class tabular sets for the paper's OpenML experiment, from the network or without it.

Source: arXiv 2311.12424, appendix on OpenML; official ``scripts/gen_openml_data.py``. Sets have at
most 20 numeric features, no missing values, and classes within a factor of two of each other.
Needs scikit-learn, and pandas for sets of OpenML: the extra ``eval``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from looped_fast.errors import check_name, naming, needs_extra
from looped_fast.tasks import Batch, batch_generator

# The ten sets behind the published accuracies, in their order. The official code selects them by
# their properties from the OpenML of 2023; these ids have the row counts that the published test
# accuracies imply (fractions of a 5 % split).
OPENML_IDS = {
    "abalone": 720,
    "bank8FM": 725,
    "space_ga": 737,
    "delta_ailerons": 803,
    "kin8nm": 807,
    "puma8NH": 816,
    "delta_elevators": 819,
    "wind": 847,
    "pollen": 871,
    "compas-two-years": 42192,
}


class DownloadError(RuntimeError):
    """A set could not be fetched; the message names it, the cause and the remedy."""


@dataclass(frozen=True)
class TabularSet:
    """A set of rows of two classes.

    Attributes:
        name: of the set.
        xs: [N, d] float32, each column with mean 0 and variance 1 (or constant 0).
        labels: [N] float32, 0 or 1.
    """

    name: str
    xs: Tensor
    labels: Tensor


def tabular_set(name: str, features: ArrayLike, target: ArrayLike) -> TabularSet:
    """Check and standardise a set. features: [N, d], numeric; target: [N], two distinct values.

    Raises:
        ValueError: non-numeric features, missing or infinite values, missing labels, or not
            two classes.
    """
    try:
        values = np.asarray(features, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"set {name!r} has features that are no numbers ({error}); drop those columns or "
            f"encode them as numbers"
        ) from error
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"set {name!r} has {bad.sum()} missing or infinite values in {bad.any(0).sum()} "
            f"columns; drop those columns or impute them"
        )
    given = np.asarray(target)
    missing = sum(map(_is_missing, given.tolist()))
    if missing:
        raise ValueError(f"set {name!r} lacks {missing} of {len(given)} labels; drop those rows")
    classes, labels = np.unique(given, return_inverse=True)
    if len(classes) != 2:
        shown = ", ".join(map(str, classes[:5]))
        raise ValueError(
            f"set {name!r} has {len(classes)} class{'es' * (len(classes) != 1)} ({shown}); two "
            f"are needed: keep the rows of two classes"
        )
    spread = values.std(0)
    scaled = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
    return TabularSet(name, torch.from_numpy(scaled).float(), torch.from_numpy(labels).float())


def _is_missing(label: object) -> bool:
    """True for None, NaN and pandas' NA; the latter two do not equal themselves."""
    return label is None or (label == label) is not True


def training_prompts(
    sets: list[TabularSet], batch_size: int, n_points: int, n_dims: int, *, seed: int, step: int
) -> Batch:
    """Prompts of one set, drawn at random as the official code does; a function of (seed, step).

    A prompt's rows are distinct. (Officially no two prompts of a batch share a row either, which
    shrinks the batches of small sets.)

    Returns:
        xs [B, n, d], with zeros before the features; ys [B, n], 0 or 1.

    Raises:
        ValueError: a set has fewer rows than a prompt, or more features than ``n_dims``.
    """
    generator = batch_generator(seed, step, 0, "cpu")
    chosen = sets[int(torch.randint(len(sets), (), generator=generator))]
    check_fits(chosen, n_points, n_dims)
    scores = torch.rand(batch_size, len(chosen.labels), generator=generator)
    return _prompts(chosen, scores.topk(n_points).indices, n_dims)


def held_out_prompts(
    tested: TabularSet, n_points: int, n_dims: int, *, rows: int, seed: int
) -> Batch:
    """One prompt for each of up to ``rows`` rows: others as context, then that row.

    Raises:
        ValueError: as in ``training_prompts``.
    """
    check_fits(tested, n_points, n_dims)
    generator = batch_generator(seed, 0, _TEST, "cpu")
    n_rows = len(tested.labels)
    queries = torch.randperm(n_rows, generator=generator)[:rows]
    contexts = []
    for row in queries:
        order = torch.randperm(n_rows - 1, generator=generator)[: n_points - 1]
        contexts.append(order + (order >= row))  # any row but the query
    return _prompts(tested, torch.cat((torch.stack(contexts), queries[:, None]), dim=1), n_dims)


_TEST = -4  # a random stream of its own; tasks/sampling.py has -1 to -3


def check_fits(tested: TabularSet, n_points: int, n_dims: int) -> None:
    """Raise ValueError unless a prompt of ``n_points`` rows can be drawn."""
    n_rows, d = tested.xs.shape
    if n_rows < n_points:
        raise ValueError(
            f"set {tested.name!r} has {n_rows} rows, a prompt needs {n_points}; lower n_points or "
            f"leave the set out"
        )
    if d > n_dims:
        raise ValueError(
            f"set {tested.name!r} has {d} features, the model takes {n_dims} (n_dims); raise "
            f"n_dims or leave the set out"
        )


def _prompts(source: TabularSet, rows: Tensor, n_dims: int) -> Batch:
    xs = source.xs[rows]  # [B, n, d]
    return Batch(pad(xs, (n_dims - xs.shape[-1], 0)), source.labels[rows])


def offline_sets() -> list[TabularSet]:
    """Ten sets that need no network: five that ship with scikit-learn, and five generated ones."""
    from sklearn import datasets as sk

    cancer, wine, iris = sk.load_breast_cancer(), sk.load_wine(), sk.load_iris()
    diabetes, digits = sk.load_diabetes(), sk.load_digits()
    pixels = digits.images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    friedman, response = sk.make_friedman1(2000, noise=1.0, random_state=0)
    sets: dict[str, tuple[Any, Any]] = {
        "breast cancer": (cancer.data[:, :10], cancer.target),
        "wine": (wine.data[wine.target < 2], wine.target[wine.target < 2]),
        "iris": (iris.data[iris.target > 0], iris.target[iris.target > 0]),
        "diabetes": (diabetes.data, diabetes.target > np.median(diabetes.target)),
        "digits": (pixels, digits.target % 2),
        "gaussians": sk.make_classification(
            2000, 12, n_informative=6, n_redundant=2, random_state=0
        ),
        "circles": sk.make_circles(2000, noise=0.1, factor=0.5, random_state=0),
        "hastie": sk.make_hastie_10_2(2000, random_state=0),
        "blobs": sk.make_blobs(2000, 8, centers=2, cluster_std=8.0, random_state=0),
        "friedman": (friedman, response > np.median(response)),
    }
    return [tabular_set(name, *data) for name, data in sets.items()]


def openml_sets() -> list[TabularSet]:
    """The paper's ten sets, from OpenML or from scikit-learn's cache of it.

    Raises:
        DownloadError: a set is not cached and can't be fetched.
        ValueError: a set has missing values or not two classes.
        ImportError: scikit-learn or pandas is not installed.
    """
    import_module("pandas")  # fetch_openml needs it, but fails only after a download
    return [_fetch(name, data_id) for name, data_id in OPENML_IDS.items()]


def _fetch(name: str, data_id: int) -> TabularSet:
    from sklearn.datasets import fetch_openml, get_data_home

    try:
        frame = fetch_openml(data_id=data_id, as_frame=True)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a wrong checksum
        raise DownloadError(
            f"can't get OpenML set {data_id} ({name}): {error}. Sets that were fetched before stay "
            f"in {get_data_home()}; try again, or use sets that need no network: --data offline"
        ) from error
    # Categorical columns are left out, as officially.
    with naming(f"OpenML set {data_id}, kept in {get_data_home()}"):
        return tabular_set(name, frame.data.select_dtypes("number"), frame.target)


COLLECTIONS: dict[str, Callable[[], list[TabularSet]]] = {
    "offline": offline_sets,
    "openml": openml_sets,
}


def load_sets(collection: str) -> list[TabularSet]:
    """The sets of ``offline`` or ``openml``.

    Raises:
        ValueError: an unknown collection, or as in ``openml_sets``.
        DownloadError: as in ``openml_sets``.
        RuntimeError: scikit-learn or pandas is not installed.
    """
    check_name("collection", collection, COLLECTIONS)
    try:
        return COLLECTIONS[collection]()
    except ImportError as error:
        raise needs_extra("tabular sets need", "scikit-learn and pandas", "eval") from error
