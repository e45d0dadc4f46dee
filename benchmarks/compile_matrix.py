"""What the compile report compiles: every form of every kernel that a GPU may run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from looped_fast.kernels.candidates import Config, source_hash

from benchmarks.compile_store import Entry, Group, Key, Report, problem, triton_version
from benchmarks.kernel_launches import PAPER_WIDTH, PRECISIONS, Case, cases
from benchmarks.machine_code import ARCHITECTURES, KIB, compile_launch
from benchmarks.predicted_time import GPUS

THOROUGH = "3.9"  # the version of Triton that is compiled for everything
VERSIONS = ("3.6", THOROUGH)  # that ``kernels/candidates.json`` is good for
N_CANDIDATES = 3  # to look for at the paper's width; the autotuner compiles and times them all

# rows, hidden_chunk, columns, num_warps, num_stages; the most promising first
_ROWS = [
    Config(32, 32, 32, 4), Config(32, 64, 64, 8), Config(64, 64, 64, 8), Config(16, 64, 64, 4),
    Config(16, 32, 32, 4), Config(32, 32, 32, 8), Config(16, 32, 32, 8), Config(16, 16, 16, 4),
    Config(16, 16, 16, 8), Config(16, 16, 16, 4, 1), Config(16, 16, 16, 8, 1),
]  # fmt: skip
# With 64 rows or more sm_90 multiplies by wgmma, and sm_100 by tcgen05. The most promising of each
# number of rows come first, since not all are compiled everywhere.
_TALL_ROWS = [
    Config(64, 64, 128, 8), Config(64, 64, 64, 8), Config(32, 64, 64, 8), Config(16, 64, 64, 4),
    Config(64, 32, 64, 8), Config(64, 64, 64, 4), Config(64, 32, 32, 4), Config(64, 32, 32, 8),
    Config(128, 64, 128, 8), Config(128, 64, 64, 8), Config(128, 32, 32, 8),
    Config(32, 64, 64, 4), Config(32, 32, 32, 4),
]  # fmt: skip
_NARROW_ROWS = [
    Config(64, 64, 64, 4), Config(32, 64, 64, 4), Config(64, 64, 64, 8), Config(32, 32, 32, 4),
    Config(16, 32, 32, 4), Config(16, 16, 16, 4),
]  # fmt: skip
# For operands of 32 bits or D = 512: larger tiles spill or do not fit, and compile for minutes.
_SMALL_ROWS = [
    Config(16, 32, 32, 4), Config(32, 32, 32, 4), Config(16, 16, 16, 4), Config(16, 16, 16, 8),
    Config(16, 16, 16, 4, 1), Config(16, 16, 16, 8, 1),
]  # fmt: skip
_SMALL_NARROW_ROWS = [Config(32, 32, 32, 4), Config(16, 32, 32, 4), Config(16, 16, 16, 4)]
# Of TRM's block, which loads three weights of the MLP at a time where GPT-2's loads two. Columns
# are pairs, and more of them than rows keep warps from repeating each other's products.
_AFTER_NORM = [Config(32, 64, 64, 8), Config(16, 64, 64, 4), Config(16, 32, 64, 4)]
_AFTER_NORM_NARROW = [Config(32, 64, 64, 4), Config(16, 64, 64, 4), Config(16, 32, 32, 4)]
_AFTER_NORM_WIDE = [
    Config(16, 32, 64, 8), Config(16, 32, 32, 8), Config(16, 16, 32, 8), Config(16, 16, 32, 8, 1),
]  # fmt: skip
_AFTER_NORM_SMALL = [Config(16, 32, 32, 4), Config(16, 16, 16, 8), Config(16, 16, 16, 8, 1)]
# Without tensor cores, where the larger tiles spill.
_AFTER_NORM_FP32 = [Config(16, 16, 16, 8), Config(16, 16, 32, 8), Config(16, 16, 16, 8, 1)]
_ATTENTION = [
    Config(32, 0, 32, 4), Config(32, 0, 32, 2), Config(64, 0, 32, 4), Config(16, 0, 32, 2),
]  # fmt: skip


def space(case: Case, arch: str) -> tuple[Config, ...]:
    """Configurations to try; the launch's own if the host code fixes it."""
    if case.kernel.startswith("attention_"):
        return tuple(_ATTENTION)
    if case.kernel.startswith("after_norm_"):
        narrow = case.width <= 128
        if case.precision == "tf32" or (case.precision == "fp32" and narrow):
            return tuple(_AFTER_NORM_SMALL)
        if case.precision == "fp32":
            return tuple(_AFTER_NORM_FP32)
        if narrow:
            return tuple(_AFTER_NORM_NARROW)
        return tuple(_AFTER_NORM_WIDE if case.width > PAPER_WIDTH else _AFTER_NORM)
    if case.kernel.startswith("row_"):
        narrow, wide = case.width <= 128, case.width > PAPER_WIDTH
        if case.precision in ("fp32", "tf32") or wide:
            return tuple(_SMALL_NARROW_ROWS if narrow else _SMALL_ROWS)
        if narrow:
            return tuple(_NARROW_ROWS)
        return tuple(_TALL_ROWS if arch in GPUS else _ROWS)
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
        """Group whose candidates the configurations may become."""
        return Group(self.case.kernel, self.arch, self.case.width, self.precision)


def is_launched(case: Case, arch: str) -> bool:
    """False if ``triton_backend.unsupported`` refuses: fp32 at D = 512 in 99 KiB."""
    wide = case.width > PAPER_WIDTH and case.precision == "fp32"
    return not (wide and ARCHITECTURES[arch].block_shared < 100 * KIB)


def is_covered(group: Group, version: str) -> bool:
    """True if the report is to cover a group in a version of Triton.

    Versions other than ``THOROUGH`` cover what the paper's model launches in 16 bits on NVIDIA GPUs
    (fp16 only on the newest). AMD is covered in bf16, as the row kernels take a minute each there,
    and not for TRM's block.
    """
    paper = group.kernel.startswith("attention_") or group.width == PAPER_WIDTH
    if group.arch.startswith("gfx"):
        paper = paper and not group.kernel.startswith("after_norm_")
        return paper and group.precision == "bf16" and version == THOROUGH
    if version == THOROUGH:
        return True
    return paper and group.precision in (("bf16", "fp16") if group.arch in GPUS else ("bf16",))


def screening(version: str, known: dict[Group, list[Config]] | None = None) -> list[Job]:
    """Jobs that find good configurations, in the form of a kernel that does most, at either mask.

    Away from the paper's width and 16-bit operands the first good one is enough. ``known``
    candidates come first: they are good in another version of Triton.
    """
    jobs = []
    for precision in PRECISIONS:
        largest: dict[tuple[str, int, bool], int] = {}
        for i, case in enumerate(cases(precision)):
            key = case.kernel, case.width, case.launch.constexprs.get("CAUSAL", True)
            best = largest.setdefault(key, i)
            if len(case.launch.types) > len(cases(precision)[best].launch.types):
                largest[key] = i
        for (kernel, width, _), i in largest.items():
            case = cases(precision)[i]
            tuned = kernel.startswith("attention_") or width == PAPER_WIDTH
            tuned = tuned and precision in ("bf16", "fp16")
            for arch in ARCHITECTURES:
                group = Group(kernel, arch, width, precision)
                if not (is_launched(case, arch) and is_covered(group, version)):
                    continue
                first = (known or {}).get(group, [])
                rest = [config for config in space(case, arch) if config not in first]
                configs = (*first, *rest)
                enough = N_CANDIDATES if tuned and not arch.startswith("gfx") else 1
                if (kernel[:4], width, precision) == ("row_", PAPER_WIDTH, "bf16") and arch in GPUS:
                    enough = len(configs)  # predicted times choose among them
                jobs.append(Job(precision, i, arch, configs, enough))
    return sorted(jobs, key=lambda job: _worth(job.group))


def _worth(group: Group) -> tuple[bool, bool, bool]:
    """Sort key: the paper's width, bf16, and GPUs whose times are predicted come first."""
    return group.width != PAPER_WIDTH, group.precision != "bf16", group.arch not in GPUS


def all_forms(candidates: dict[Group, list[Config]], version: str, full: bool = False) -> list[Job]:
    """Every form of every kernel in every candidate, first candidates first.

    Covers bf16 at the paper's width, in the first candidate, or the first three of GPT-2's kernels
    on GPUs whose times are predicted; those of TRM's by ``THOROUGH`` only. Elsewhere only the form
    that does most is compiled, which the others are parts of; the autotuner drops what does not
    run. ``full``: every candidate everywhere.
    """
    ranked = []
    for precision in PRECISIONS if full else PRECISIONS[:1]:
        for i, case in enumerate(cases(precision)):
            if not full and case.width != PAPER_WIDTH:
                continue
            for arch in ARCHITECTURES:
                group = Group(case.kernel, arch, case.width, precision)
                if not (is_launched(case, arch) and is_covered(group, version)):
                    continue
                if arch.startswith("gfx") and not full:
                    continue
                if case.kernel.startswith("after_norm_") and version != THOROUGH:
                    continue
                chosen = candidates.get(group, [])
                predicted = arch in GPUS and not case.kernel.startswith("after_norm_")
                n = len(chosen) if full else 3 if predicted else 1
                for rank, config in enumerate(chosen[:n]):
                    job = Job(precision, i, arch, (config,), 1)
                    ranked.append(((arch not in GPUS, rank), job))
    ranked.sort(key=lambda item: item[0])
    return [job for _, job in ranked]


def entry_key(job: Job, config: Config, version: str | None = None) -> Key:
    """Key of a job's configuration in the report, for this Triton or ``version``."""
    case = job.case
    source = source_hash(case.launch.kernel)
    return Key(*job.group, case.form, config.astuple(), source, version or triton_version())


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
        if sum(problem(found) is None for found in entries) == job.enough:
            break
    return entries


def run(jobs: list[Job], report: Report, processes: int) -> Iterator[list[Entry]]:
    """Yield the entries of each job in turn, compiling what ``report`` lacks."""
    work = []
    for job in jobs:
        keys = [entry_key(job, config) for config in job.configs]
        work.append((job, {key: report[key] for key in keys if key in report}))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_run, work)
