"""A visit to a GPU: where a part runs, at which sizes, and where its results go."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case

TIMED = ("lr", "dt", "lr_b1", "dt_b1")
# The smallest size that kernels take: a second in the interpreter.
TINY = {"batch": 1, "n_points": 3, "n_loops": 1, "window": 1, "n_embd": 64, "n_head": 4}


@dataclass(frozen=True)
class Visit:
    """Settings of one run of ``python -m benchmarks.gpu``."""

    out: Path  # folder of results
    dry: bool = False  # on the CPU, interpreted, at tiny sizes: shows that the code runs

    @property
    def device(self) -> torch.device:
        """Device of all parts."""
        return torch.device("cpu" if self.dry else "cuda")

    def case(self, name: str) -> Case:
        """A case of ``benchmarks.cases``, tiny in a dry run."""
        return dataclasses.replace(CASES[name], **TINY) if self.dry else CASES[name]

    @property
    def cases(self) -> dict[str, Case]:
        """Cases to time, by name."""
        return {name: self.case(name) for name in (TIMED[:1] if self.dry else TIMED)}

    @property
    def path(self) -> Path:
        """The file of results: ``gpu_<card>.json``."""
        card = "dry_run" if self.dry else torch.cuda.get_device_name()
        return self.out / f"gpu_{slug(card)}.json"

    def load(self) -> dict[str, dict[str, Any]]:
        """Results so far, by name of the part."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def start(self, part: str, **values: Any) -> None:
        """Replace the results of a part by ``values``."""
        self._write(self.load() | {part: values})

    def save(self, part: str, **values: Any) -> None:
        """Add ``values`` to the results of a part."""
        results = self.load()
        self._write(results | {part: results.get(part, {}) | values})

    def _write(self, results: dict[str, dict[str, Any]]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def best_configs(self, case: str) -> dict[str, tuple[int, ...]]:
        """Fastest configuration that ``rows`` found for a case, by kernel; {} before ``rows``."""
        return self.load().get("rows", {}).get("best", {}).get(case, {})


def slug(card: str) -> str:
    """Name for files: ``h100_80gb_hbm3`` for ``NVIDIA H100 80GB HBM3``."""
    return re.sub(r"[^a-z0-9]+", "_", card.lower().removeprefix("nvidia ")).strip("_")


def say(*words: object) -> None:
    """Print a line unbuffered, so that it is seen if a time limit ends the part."""
    print(*words, flush=True)
