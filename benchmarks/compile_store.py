"""The stored compile report, and the configurations that are good according to it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

from looped_fast.kernels.candidates import Config

from benchmarks import predicted_time
from benchmarks.cases import CASES
from benchmarks.machine_code import ARCHITECTURES
from benchmarks.phases import Phase
from looped_fast import kernels

REPORT = Path(__file__).parent / "results/compile_report.json"
CANDIDATES = Path(kernels.__file__).with_name("candidates.json")
FEW_SPILLS = 64  # instructions, outside loops; configurations with more come last
LITTLE_DUPLICATION = 1.25
# Share of the instructions in a kernel's loops that may be spills. A spill takes as much of the
# pipe to L1 and shared memory as an LDS, one clock per warp, and a reload from L1 arrives after
# about 30. An instruction in the loops of the row kernels costs that pipe 0.4 to 1.1 clocks on
# average: with 2 % of spills loops take 2 to 5 % longer, or 15 % where nothing hides a wait (a loop
# of 750 instructions and 1400 clocks: 7 reloads, 210 clocks). Predicted times count the first part.
SPILL_LIMIT = 0.02


def triton_version() -> str:
    """Major and minor version of the Triton in this Python, ``"3.6"``, as in ``Key.triton``."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


class Group(NamedTuple):
    """Launches that share candidates."""

    kernel: str
    arch: str
    width: int
    precision: str


class Key(NamedTuple):
    """Identity of an entry."""

    kernel: str
    arch: str
    width: int
    precision: str
    form: str  # of the launch, see ``kernel_launches.Case``
    config: tuple[int, ...]
    source: str  # ``candidates.source_hash`` of the kernel
    triton: str  # version that compiled it, major and minor

    @property
    def group(self) -> Group:
        """Group whose candidate the configuration may be."""
        return Group(*self[:4])


Entry = dict[str, Any]  # the fields of Key, then those of machine_code.MachineCode or "error"
Report = dict[Key, Entry]


def problem(entry: Entry) -> str | None:
    """Why a configuration is out; None if it is good."""
    limit = ARCHITECTURES[entry["arch"]].block_shared
    if "error" in entry:
        return entry["error"]
    if entry["spill_share"] > SPILL_LIMIT:
        return f"{entry['spill_share']:.1%} of loops are spills, the limit is {SPILL_LIMIT:.0%}"
    if entry["shared"] > limit:
        return f"{entry['shared']} bytes of shared memory, the limit is {limit}"
    if entry["products"] and entry["precision"] != "fp32" and not entry["tensor_core"]:
        return "matrix products without tensor cores"
    return None


def candidates(report: Report) -> dict[Group, list[Config]]:
    """Configurations that have no problem in any form of their kernel compiled so far.

    Every version of Triton that compiled anything for a group must find them good. If a time can be
    predicted, the fastest come first, and few of each kind are kept. Otherwise they come in the
    order in which they were tried, and last those whose warps repeat each other's work, or that
    spill a lot outside loops.
    """
    found: dict[Group, dict[Config, list[Entry]]] = {}
    versions: dict[Group, set[str]] = {}
    for key, entry in report.items():
        configs = found.setdefault(key.group, {})
        configs.setdefault(Config(*key.config), []).append(entry)
        versions.setdefault(key.group, set()).add(key.triton)

    def cost(entries: list[Entry]) -> tuple[bool, bool]:
        return (
            max(entry["duplication"] for entry in entries) > LITTLE_DUPLICATION,
            max(entry["spills"] for entry in entries) > FEW_SPILLS,
        )

    chosen = {}
    for group, configs in found.items():
        good = {
            config: entries
            for config, entries in configs.items()
            if not any(map(problem, entries))
            if {entry["triton"] for entry in entries} == versions[group]
        }
        found_times = {config: predicted(config, entries) for config, entries in good.items()}
        times = {config: time for config, time in found_times.items() if time is not None}
        if times:
            chosen[group] = few_of_each_kind(sorted(times, key=times.__getitem__))
        else:
            chosen[group] = sorted(good, key=lambda config, good=good: cost(good[config]))
    return chosen


def predicted(config: Config, entries: list[Entry]) -> float | None:
    """Seconds of a launch of the row kernels at LR's size, in the slowest of ``entries``.

    None for other kernels, and if ``predicted_time`` can't predict on the architecture or from an
    entry.
    """
    gpu = predicted_time.GPUS.get(entries[0]["arch"])
    if gpu is None or not entries[0]["kernel"].startswith("row_"):
        return None
    if not all(predicted_time.is_predictable(entry, gpu) for entry in entries):
        return None
    lr = CASES["lr"]
    programs = -(-lr.batch * 2 * lr.n_points // config.rows)
    return max(predicted_time.seconds(entry, programs, gpu) for entry in entries)


def few_of_each_kind(ranked: list[Config]) -> list[Config]:
    """The first two of ``ranked``, and the first of every other number of rows.

    Programs of few rows suit small batches, of many rows large ones; the autotuner compiles all
    that are kept.
    """
    kept = ranked[:2]
    for config in ranked[2:]:
        if config.rows not in {other.rows for other in kept}:
            kept.append(config)
    return kept


def load() -> Report:
    """The stored report."""
    entries = json.loads(REPORT.read_bytes())["entries"] if REPORT.exists() else []
    report = {}
    for entry in entries:
        entry["config"] = tuple(entry["config"])
        if "phases" in entry:  # it compiled
            entry["phases"] = [Phase(*phase) for phase in entry["phases"]]
        report[key_of(entry)] = entry
    return report


def key_of(entry: Entry) -> Key:
    values = {name: entry[name] for name in Key._fields}
    return Key(**values)


def store(report: Report) -> None:
    """Write the report, an entry a line, and the candidates that follow from it."""
    lines = ",\n".join(json.dumps(entry) for entry in report.values())
    _write(REPORT, f'{{"entries": [\n{lines}\n]}}\n')
    # What was not compiled stays; so do sm_80's candidates if none is good, as launches that are
    # recorded on a CPU use them.
    known = json.loads(CANDIDATES.read_bytes()) if CANDIDATES.exists() else {}
    for group, configs in candidates(report).items():
        if configs or group.arch != "sm_80":
            by_case = known.setdefault(group.kernel, {}).setdefault(group.arch, {})
            by_case[f"{group.width} {group.precision}"] = [config.astuple() for config in configs]
    _write(CANDIDATES, json.dumps(known, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
