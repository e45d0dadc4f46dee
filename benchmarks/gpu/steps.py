"""Time whole training steps and inference calls, and all opponents, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from benchmarks.cases import CONTENDERS
from benchmarks.gpu.configurations import forced
from benchmarks.gpu.visit import Visit, say
from benchmarks.measure import measure_full_batch

SECONDS = 115  # after these nothing more is started
REPEATS, SECONDS_EACH = 15, 0.5


class Entry(NamedTuple):
    """A line of the table."""

    contender: str  # of benchmarks.cases
    configs: str = "tuned"  # how kernels' configurations are chosen

    @property
    def name(self) -> str:
        """Name to print."""
        engine = CONTENDERS[self.contender].is_engine
        return f"{self.contender}, {self.configs}" if engine else self.contender


ENTRIES = (
    Entry("triton bf16 graphs", "first candidates"),
    Entry("triton bf16 graphs", "best of rows"),
    Entry("compiled step bf16 graphs"),
    Entry("eager bf16 graphs"),
    Entry("triton bf16 graphs"),
    Entry("eager bf16"),
    Entry("compiled step bf16"),
    Entry("triton bf16", "first candidates"),
    Entry("triton fp32 graphs", "first candidates"),
    Entry("eager fp32"),
)
PLACES = (
    ("lr", "training"), ("dt", "training"), ("lr_b1", "inference"), ("dt_b1", "inference"),
    ("lr", "inference"),
)  # fmt: skip


def run(visit: Visit) -> None:
    """Measure for ``SECONDS``; print how the best of ours compares with the best opponent."""
    end = time.monotonic() + SECONDS
    table: dict[str, dict[str, Any]] = {}
    entries, places = (ENTRIES[:3], PLACES[-1:]) if visit.dry else (ENTRIES, PLACES)
    for entry in entries:
        for case, mode in places:
            if time.monotonic() > end:
                say(f"not measured, the {SECONDS} s are over: {entry.name}, {case} {mode}")
                continue
            row = measured(entry, case, mode, visit)
            table.setdefault(f"{case} {mode}", {})[entry.name] = row
            visit.save("steps", table=table)
            say(f"{case:6} {mode:10} {entry.name:38} {described(row)}")
    for place, rows in table.items():
        say(f"{place}: {compared(rows)}")


def described(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    wrong = f"  WRONG: {row['wrong']}" if "wrong" in row else ""
    return f"{row['ms']:9.2f} ms{wrong}"


def measured(entry: Entry, case: str, mode: str, visit: Visit) -> dict[str, Any]:
    """A row as in ``benchmarks.measure``, even if results are wrong; or why it ``failed``."""
    contender = CONTENDERS[entry.contender]
    if visit.dry:  # neither graphs nor compilers
        backend = contender.backend if contender.is_engine else "reference"
        contender = dataclasses.replace(contender, graphs=False, backend=backend)
    try:
        with _configured(entry, case, visit):
            return measure_full_batch(
                visit.case(case), contender, mode, REPEATS, SECONDS_EACH, visit.device.type,
                keep_wrong=True,
            )  # fmt: skip
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
    finally:
        torch.cuda.empty_cache()


def _configured(entry: Entry, case: str, visit: Visit) -> AbstractContextManager[None]:
    if entry.configs == "tuned":
        return contextlib.nullcontext()
    return forced(visit.best_configs(case) if entry.configs == "best of rows" else {})


def compared(rows: dict[str, dict[str, Any]]) -> str:
    """Our fastest entry and the fastest opponent in bf16, and the ratio of their times."""
    fastest: dict[bool, tuple[float, str]] = {}
    for entry in ENTRIES:
        contender, ms = CONTENDERS[entry.contender], rows.get(entry.name, {}).get("ms")
        if contender.precision == "bf16" and ms is not None:
            name = f"{entry.name} (wrong)" if "wrong" in rows[entry.name] else entry.name
            here = fastest.get(contender.is_engine, (float("inf"), ""))
            fastest[contender.is_engine] = min(here, (ms, name))
    if len(fastest) < 2:
        return "too little was measured to compare"
    (ours, name), (theirs, opponent) = fastest[True], fastest[False]
    return f"{name} {ours:.2f} ms, {opponent} {theirs:.2f} ms: {theirs / ours:.2f} times as fast"
