"""What the compile report compiles: every form of every kernel that a GPU may be asked for."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from benchmarks.compile_store import Entry, Group, Key, Report, problem
from benchmarks.kernel_launches import PAPER_WIDTH, PRECISIONS, Case, cases
from benchmarks.machine_code import ARCHITECTURES, KIB, compile_launch
from looped_fast.kernels.tuning import Config, source_hash

N_CANDIDATES = 3  # to look for at the paper's width; the autotuner compiles and times them all

# rows, hidden_chunk, columns, num_warps, num_stages; the most promising first
_ROWS = [
    Config(32, 32, 32, 4), Config(32, 64, 64, 8), Config(64, 64, 64, 8), Config(16, 64, 64, 4),
    Config(16, 32, 32, 4), Config(32, 32, 32, 8), Config(16, 32, 32, 8), Config(16, 16, 16, 4),
    Config(16, 16, 16, 8), Config(16, 16, 16, 4, 1), Config(16, 16, 16, 8, 1),
]  # fmt: skip
_NARROW_ROWS = [
    Config(64, 64, 64, 4), Config(32, 64, 64, 4), Config(64, 64, 64, 8), Config(32, 32, 32, 4),
    Config(16, 32, 32, 4), Config(16, 16, 16, 4),
]  # fmt: skip
# Of operands of 32 bits or D = 512: larger ones spill or do not fit, and take minutes to show it.
_SMALL_ROWS = [
    Config(16, 32, 32, 4), Config(32, 32, 32, 4), Config(16, 16, 16, 4), Config(16, 16, 16, 8),
    Config(16, 16, 16, 4, 1), Config(16, 16, 16, 8, 1),
]  # fmt: skip
_SMALL_NARROW_ROWS = [Config(32, 32, 32, 4), Config(16, 32, 32, 4), Config(16, 16, 16, 4)]
_ATTENTION = [
    Config(32, 0, 32, 4), Config(32, 0, 32, 2), Config(64, 0, 32, 4), Config(16, 0, 32, 2),
]  # fmt: skip


def space(case: Case) -> tuple[Config, ...]:
    """Configurations to try; the launch's own where the host code fixes it."""
    if case.kernel.startswith("attention_"):
        return tuple(_ATTENTION)
    if case.kernel.startswith("row_"):
        narrow, wide = case.width <= 128, case.width > PAPER_WIDTH
        if case.precision in ("fp32", "tf32") or wide:
            return tuple(_SMALL_NARROW_ROWS if narrow else _SMALL_ROWS)
        return tuple(_NARROW_ROWS if narrow else _ROWS)
    return (case.launch.config,)


class Job(NamedTuple):
    """Compile a case in ``configs``, until ``enough`` of them are good."""

    precision: str
    index: int  # in ``cases(precision)``: a case holds a kernel, which can't go between processes
    arch: str
    configs: tuple[Config, ...]
    enough: int

    @property
    def case(self) -> Case:
        """What to compile."""
        return cases(self.precision)[self.index]

    @property
    def group(self) -> Group:
        """Whose candidates the configurations may become."""
        return Group(self.case.kernel, self.arch, self.case.width, self.precision)


def is_launched(case: Case, arch: str) -> bool:
    """Not where ``triton_backend.why_not`` refuses: 32-bit operands at D = 512 in 99 KiB."""
    wide = case.width > PAPER_WIDTH and case.precision in ("fp32", "tf32")
    return not (wide and ARCHITECTURES[arch].block_shared < 100 * KIB)


def screening() -> list[Job]:
    """Which configurations are good: those that are in the form of a kernel that does most.

    Away from the paper's width and 16-bit operands the first good one is enough, and AMD is left
    out: the row kernels take a minute each to compile there.
    """
    jobs = []
    for precision in PRECISIONS:
        largest: dict[tuple[str, int], int] = {}
        for i, case in enumerate(cases(precision)):
            best = largest.setdefault((case.kernel, case.width), i)
            if len(case.launch.types) > len(cases(precision)[best].launch.types):
                largest[case.kernel, case.width] = i
        for i in largest.values():
            case = cases(precision)[i]
            tuned = case.kernel.startswith("attention_") or case.width == PAPER_WIDTH
            tuned = tuned and precision in ("bf16", "fp16")
            jobs += [
                Job(precision, i, arch, space(case), N_CANDIDATES if tuned else 1)
                for arch in ARCHITECTURES
                if arch.startswith("sm_") or (tuned and precision == "bf16")
                if is_launched(case, arch)
            ]
    return sorted(jobs, key=lambda job: job.case.width != PAPER_WIDTH)


def all_forms(candidates: dict[Group, list[Config]], full: bool = False) -> list[Job]:
    """Every form of every kernel in every candidate, first candidates first.

    At the paper's width in bf16; ``full``, everywhere. Elsewhere it is left at the form that does
    most, which the others are parts of.
    """
    ranked = []
    for precision in PRECISIONS if full else PRECISIONS[:1]:
        for i, case in enumerate(cases(precision)):
            if not full and case.width != PAPER_WIDTH:
                continue
            for arch in ARCHITECTURES:
                if not is_launched(case, arch):
                    continue
                group = Group(case.kernel, arch, case.width, precision)
                for rank, config in enumerate(candidates.get(group, [])):
                    ranked.append((rank, Job(precision, i, arch, (config,), 1)))
    ranked.sort(key=lambda item: item[0])
    return [job for _, job in ranked]


def entry_key(job: Job, config: Config) -> Key:
    """Where the report keeps the entry of a job's configuration."""
    case = job.case
    return Key(*job.group, case.form, config.astuple(), source_hash(case.launch.kernel))


def compile_entry(job: Job, config: Config) -> Entry:
    """Compile a job in one configuration."""
    launch = job.case.launch
    tiles = config.tiles(launch.kernel.arg_names)
    measured = compile_launch(
        replace(launch, config=config, constexprs=launch.constexprs | tiles), job.arch
    )
    found = {"error": measured} if isinstance(measured, str) else measured.asdict()
    return entry_key(job, config)._asdict() | found


def _run(work: tuple[Job, Report]) -> list[Entry]:
    job, known = work
    entries: list[Entry] = []
    for config in job.configs:
        entries.append(known.get(entry_key(job, config)) or compile_entry(job, config))
        if sum(problem(entry) is None for entry in entries) == job.enough:
            break
    return entries


def run(jobs: list[Job], report: Report, processes: int) -> Iterator[list[Entry]]:
    """The entries of each job in turn; what ``report`` has already is not compiled again."""
    work = []
    for job in jobs:
        keys = [entry_key(job, config) for config in job.configs]
        work.append((job, {key: report[key] for key in keys if key in report}))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_run, work)
