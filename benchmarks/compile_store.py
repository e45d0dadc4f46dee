"""The stored compile report, and what follows from it: which configurations are good where."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine_code import ARCHITECTURES
from looped_fast.kernels import tuning
from looped_fast.kernels.tuning import Config

REPORT = Path(__file__).parent / "results/compile_report.json"
CANDIDATES = Path(tuning.__file__).with_name("candidates.json")
FEW_SPILLS = 64  # instructions, outside loops; with more a configuration comes after the others
LITTLE_DUPLICATION = 1.25


class Group(NamedTuple):
    """What has candidates of its own."""

    kernel: str
    arch: str
    width: int
    precision: str


class Key(NamedTuple):
    """What was compiled."""

    kernel: str
    arch: str
    width: int
    precision: str
    form: str  # of the launch, see ``kernel_launches.Case``
    config: tuple[int, ...]
    source: str  # ``tuning.source_hash`` of the kernel

    @property
    def group(self) -> Group:
        """Whose candidate the configuration may be."""
        return Group(*self[:4])


Entry = dict[str, Any]  # the fields of Key, then those of machine_code.MachineCode or "error"
Report = dict[Key, Entry]


def problem(entry: Entry) -> str | None:
    """What rules a configuration out; None where it is good."""
    limit = ARCHITECTURES[entry["arch"]].block_shared
    if "error" in entry:
        return entry["error"]
    if entry["spills_in_loop"]:
        return f"{entry['spills_in_loop']} spills in a loop"
    if entry["shared"] > limit:
        return f"{entry['shared']} bytes of shared memory, the limit is {limit}"
    if entry["products"] and entry["precision"] != "fp32" and not entry["tensor_core"]:
        return "matrix products without tensor cores"
    return None


def candidates(report: Report) -> dict[Group, list[Config]]:
    """Configurations that have no problem in any form of their kernel compiled so far.

    In the order in which they were tried; but those come last in which warps repeat each other's
    work, or that spill a lot outside loops.
    """
    found: dict[Group, dict[Config, list[Entry]]] = {}
    for key, entry in report.items():
        of_group = found.setdefault(key.group, {})
        of_group.setdefault(Config(*key.config), []).append(entry)

    def cost(entries: list[Entry]) -> tuple[bool, bool]:
        return (
            max(entry["duplication"] for entry in entries) > LITTLE_DUPLICATION,
            max(entry["spills"] for entry in entries) > FEW_SPILLS,
        )

    chosen = {}
    for group, configs in found.items():
        good = {c: entries for c, entries in configs.items() if not any(map(problem, entries))}
        chosen[group] = sorted(good, key=lambda config, good=good: cost(good[config]))
    return chosen


def load() -> Report:
    """The stored report."""
    entries = json.loads(REPORT.read_text())["entries"] if REPORT.exists() else []
    return {key_of(entry): entry | {"config": tuple(entry["config"])} for entry in entries}


def key_of(entry: Entry) -> Key:
    values = {name: entry[name] for name in Key._fields}
    return Key(**values | {"config": tuple(values["config"])})


def store(report: Report) -> None:
    """Write the report, an entry a line, and the candidates that follow from it."""
    lines = ",\n".join(json.dumps(entry) for entry in report.values())
    version = json.dumps(importlib.metadata.version("triton"))
    _write(REPORT, f'{{"triton": {version}, "entries": [\n{lines}\n]}}\n')
    # What was not compiled stays as it was; and so does sm_80, with whose candidates launches are
    # recorded on a CPU.
    known = json.loads(CANDIDATES.read_text()) if CANDIDATES.exists() else {}
    for group, configs in candidates(report).items():
        if configs or group.arch != "sm_80":
            of_arch = known.setdefault(group.kernel, {}).setdefault(group.arch, {})
            of_arch[f"{group.width} {group.precision}"] = [config.astuple() for config in configs]
    _write(CANDIDATES, json.dumps(known, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
