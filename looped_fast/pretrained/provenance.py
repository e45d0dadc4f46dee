"""Provenance to write beside results: versions of packages, hashes of weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

from looped_fast.config import VERSION
from looped_fast.errors import read_file
from looped_fast.pretrained.weights import read_newest
from looped_fast.training import checkpoint

_MAX_BYTES = 2**36  # of weights, as in training/checkpoint_read.py
PACKAGES = ("python", "torch", "numpy", "scikit-learn", "xgboost")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of looped_fast and of ``packages``, or ``not installed``."""
    return {"looped_fast": VERSION, **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    if package == "python":
        return platform.python_version()
    for distribution in (package, f"{package}-cpu"):  # XGBoost is in xgboost or xgboost-cpu
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return "not installed"


def weights_sha256(source: str | Path) -> str:
    """Hash the weights of a run (its newest checkpoint), a checkpoint, or a shipped model.

    Raises:
        FileNotFoundError: ``source`` is none of these.
    """
    return read_newest(source, file_sha256)


def file_sha256(path: Path) -> str:
    """Hash the weights file of one checkpoint."""
    return hashlib.sha256(read_file(path / checkpoint.MODEL, _MAX_BYTES)).hexdigest()
