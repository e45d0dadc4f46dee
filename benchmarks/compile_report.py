"""Compile every kernel without a GPU, and report on the machine code.

``python -m benchmarks.compile_report`` prints the stored report, and what is wrong or missing in
it; ``--update`` compiles what is new or has changed, and stores the report and, for
``kernels/tuning.py``, which configurations are good where; ``--verify`` compiles a few kernels
again and compares them with the stored entries. Both compile by the Triton of the Python they run
in; the report holds ``compile_matrix.VERSIONS``, so run ``--update`` with each.
"""

from __future__ import annotations

import os
import sys

from looped_fast.kernels.candidates import source_hash
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.compile_matrix import (
    VERSIONS,
    Job,
    all_forms,
    compile_entry,
    entry_key,
    run,
    screening,
)
from benchmarks.compile_store import (
    Entry,
    Group,
    Report,
    candidates,
    key_of,
    load,
    problem,
    store,
    triton_version,
)
from benchmarks.kernel_launches import PRECISIONS, cases
from looped_fast.training.command_line import Parser


def update(processes: int, kernels: list[str] | None, full: bool) -> None:
    """Compile what the stored report lacks, for ``kernels`` or all, and store it on the way."""
    sources, version = _present().values(), triton_version()
    report = {key: entry for key, entry in load().items() if key.source in sources}
    _add(screening(version, candidates(report)), report, processes, kernels)
    _add(all_forms(candidates(report), version, full), report, processes, kernels)


def _add(jobs: list[Job], report: Report, processes: int, kernels: list[str] | None) -> None:
    jobs = [job for job in jobs if kernels is None or job.case.kernel in kernels]
    runs = run(jobs, report, processes)
    for entries in tqdm(runs, total=len(jobs), mininterval=30):
        report |= {key_of(entry): entry for entry in entries}
        store(report)


def _present() -> dict[str, str]:
    """Hash of the source of each kernel that the host code launches."""
    launches = (case.launch for precision in PRECISIONS for case in cases(precision))
    return {launch.name: source_hash(launch.kernel) for launch in launches}


def faults(report: Report) -> list[str]:
    """Faults of a stored report: kernels that have changed, groups without a good configuration."""
    sources = _present()
    stored = {key.kernel: key.source for key in report}
    found = [
        f"{name}: stored for another source; run python -m benchmarks.compile_report --update"
        for name in sorted(stored)
        if sources.get(name) != stored[name]
    ]
    for group, chosen in candidates(report).items():
        if not chosen and group.arch.startswith("sm_"):  # AMD: where it compiles
            reasons = {problem(entry) for key, entry in report.items() if key.group == group}
            found.append(f"{' '.join(map(str, group))}: no configuration is good: {reasons}")
    return found


def gaps(report: Report) -> list[str]:
    """What a stored report lacks: its candidates are a guess until ``--update`` has run."""
    found = []
    for version in VERSIONS:
        stored = {key.group for key in report if key.triton == version}
        groups = {job.group for job in screening(version)} - stored
        forms = [
            job for job in all_forms(candidates(report), version)
            if entry_key(job, job.configs[0], version) not in report
        ]  # fmt: skip
        found += [
            f"not compiled yet by Triton {version}: {' '.join(map(str, group))}"
            for group in sorted(groups)
        ]
        if forms:
            found.append(
                f"not compiled yet by Triton {version}: {len(forms)} forms, "
                f"such as {forms[0].case[:4]}"
            )
    return found


# A kernel and an architecture of each kind, small enough to compile in seconds.
SAMPLE = (
    ("attention_forward_kernel", "sm_90", 32, "bf16"),
    ("attention_backward_kernel", "sm_100", 32, "bf16"),
    ("row_forward_kernel", "sm_80", 64, "bf16"),
    ("row_backward_kernel", "sm_120", 64, "fp16"),
    ("row_forward_kernel", "sm_89", 64, "fp32"),
    ("after_norm_forward_kernel", "sm_90", 64, "bf16"),
    ("after_norm_backward_kernel", "sm_120", 64, "bf16"),
)


def verify(report: Report) -> list[str]:
    """Compile the sample again; return what is worse than in the stored report."""
    found = []
    for job in screening(triton_version()):
        if job.group not in {Group(*sample) for sample in SAMPLE}:
            continue
        chosen = candidates(report).get(job.group)
        if not chosen or entry_key(job, chosen[0]) not in report:
            found.append(f"{' '.join(map(str, job.group))}: not stored; run --update")
            continue
        stored = report[entry_key(job, chosen[0])]
        found += regressions(compile_entry(job, chosen[0]), stored)
    return found


def regressions(now: Entry, before: Entry) -> list[str]:
    """What got worse from one entry to another of the same kernel and configuration."""
    if reason := problem(now):
        worse = [reason]
    else:
        worse = [
            f"{name} was {before[name]}, is {now[name]}"
            for name in ("registers", "spills", "shared", "duplication")
            if now[name] > before[name]
        ]
        if now["tensor_core"] < before["tensor_core"]:
            worse.append(f"tensor_core was {before['tensor_core']}, is {now['tensor_core']}")
    return [f"{' '.join(map(str, key_of(now).group))}: {reason}" for reason in worse]


def summary(report: Report) -> str:
    """A line for each group: its first candidate, at its worst over all forms and versions."""
    chosen = candidates(report)
    lines = []
    for group in sorted(chosen):
        if not chosen[group]:
            lines.append((*group, "none is good"))
            continue
        config = chosen[group][0]
        entries = [
            entry for key, entry in report.items()
            if key.group == group and key.config == config.astuple()
        ]  # fmt: skip

        def worst(name, pick=max, entries=entries):
            return pick(entry[name] for entry in entries)

        lines.append(
            (*group, " ".join(map(str, config.astuple())), len(chosen[group]),
             " ".join(sorted({entry["triton"] for entry in entries})), len(entries),
             worst("registers"), worst("spills"), worst("spills_in_loop"), worst("shared") // 1024,
             worst("tensor_core"), worst("async_copy"), worst("special_function"),
             worst("duplication"), worst("blocks_per_sm", min))
        )  # fmt: skip
    headers = (
        "kernel", "arch", "width", "precision", "config", "candidates", "Triton", "forms",
        "registers", "spills", "in loops", "shared KiB", "tensor core", "async copy", "special",
        "duplication", "blocks / SM",
    )  # fmt: skip
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if something is wrong or missing in the report."""
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="compile what the report lacks")
    parser.add_argument("--verify", action="store_true", help="compile a sample again")
    parser.add_argument("--kernels", nargs="+", help="of --update: only these")
    parser.add_argument("--full", action="store_true", help="of --update: all forms everywhere")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    if args.update:
        update(args.processes, args.kernels, args.full)
    report = load()
    found = faults(report) + (verify(report) if args.verify else gaps(report))
    if not args.verify:
        print(summary(report))
    print("\n".join(found) or f"good: {len(report)} kernels compiled")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
