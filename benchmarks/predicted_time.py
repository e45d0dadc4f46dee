"""Predict how long a kernel takes on an absent GPU, from the compile report.

**A prediction, not a measurement.** A kernel's entry says what a program (thread block) does in
its straight-line code and in each loop (``phases.Phase``). A phase takes as long as the slowest of

    shared memory      what LDS, LDSM, LDGSTS, ... move and what wgmma and tcgen05 read themselves
    tensor cores       operations as issued; mma.sync reaches ``MMA_SYNC`` of wgmma's rate
    issue slots        one instruction per clock and scheduler; a warp issues one in ``STALL``
                       clocks, and waits ``SPILL_STALL`` more for one that spills

and phases follow each other. The multiprocessor with the most programs decides when a launch ends;
those that it holds at a time overlap, up to the sum of their demands on its slowest part. A launch
takes no less than the L2 cache and DRAM need for the bytes of all programs: loads and stores pass
the L2 in both directions at once; loops load weights, which DRAM delivers once. Spilled registers
pass the L2 as well: beside 100 to 200 KiB of shared memory L1 is too small.

Left out are bank conflicts, latencies that neither warps nor the pipeline hide, clock changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.phases import Phase


@dataclass(frozen=True)
class Gpu:
    """Rates that a GPU reaches."""

    name: str
    arch: str
    processors: int  # streaming multiprocessors
    clock: float  # Hz
    flops: float  # bf16, of wgmma or tcgen05
    l2_bandwidth: float  # bytes/s
    bandwidth: float  # of DRAM, bytes/s


# H100: matrix rate, bandwidths and clock as measured on one (copies and large products of the
# vendor's library). B200: those of the data sheet, less an H100's shortfall from its own.
H100 = Gpu("H100 SXM", "sm_90", 132, 1.98e9, 790e12, 5.5e12, 3.0e12)
B200 = Gpu("B200", "sm_100", 148, 1.85e9, 1800e12, 9.0e12, 7.2e12)
GPUS = {gpu.arch: gpu for gpu in (H100, B200)}

SHARED = 0.9 * 128  # bytes per clock and multiprocessor, less a tenth for conflicts and barriers
MMA_SYNC = 0.62  # of wgmma's rate, as measured by others on an H100
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction per clock
STALL = 2.0  # clocks between instructions of a warp, latencies that it waits for included
SPILL_STALL = 10.0  # an L2 round trip of 250 clocks, with 25 in flight
GRAPH_START = 1.5e-6  # seconds from one kernel of a CUDA graph to the next

Entry = dict[str, Any]  # of the compile report


def is_predictable(entry: Entry, gpu: Gpu) -> bool:
    """True if the entry has what a prediction needs."""
    return "error" not in entry and bool(entry["phases"]) and entry["arch"] == gpu.arch


def seconds(entry: Entry, programs: int, gpu: Gpu, trips: Sequence[float] = ()) -> float:
    """Predicted time of one launch, inside a CUDA graph.

    Args:
        entry: an entry of the compile report for ``gpu.arch``.
        programs: number of programs of the launch.
        gpu: GPU that it runs on.
        trips: mean passes through each loop, if the sequence's length decides.

    Raises:
        ValueError: the entry has no phases, or ``trips`` are needed.
    """
    if not is_predictable(entry, gpu):
        raise ValueError(f"nothing to predict from for {gpu.name}: {entry['kernel']}")
    parts = [Phase(*phase) for phase in entry["phases"]]
    times = [1.0, *(trips or [phase.trips for phase in parts[1:]])]
    if len(times) != len(parts) or not all(times):
        raise ValueError(f"{entry['kernel']} has {len(parts) - 1} loops: give trips of each")
    warps = entry["config"][3]
    busiest = -(-programs // gpu.processors)
    resident = max(1, min(busiest, entry["blocks_per_sm"]))
    latency = 0.0  # clocks of one program without others
    needed = [0.0, 0.0, 0.0]  # clocks of each part of the multiprocessor
    loaded = stored = 0.0
    rate = gpu.flops / gpu.processors / gpu.clock * (1 if entry["asynchronous_mma"] else MMA_SYNC)
    for phase, n in zip(parts, times, strict=True):
        issued = n * phase.instructions * warps / SCHEDULERS
        stalled = n * (phase.instructions * STALL + phase.spills * SPILL_STALL)
        clocks = [n * phase.shared / SHARED, n * phase.flops / rate, issued]
        latency += max(*clocks, stalled)
        needed = [total + more for total, more in zip(needed, clocks, strict=True)]
        loaded += n * phase.loaded
        stored += n * phase.stored
    busiest_clocks = max(-(-busiest // resident) * latency, busiest * max(needed))
    return max(
        GRAPH_START,
        busiest_clocks / gpu.clock,
        programs * max(loaded, stored) / gpu.l2_bandwidth,
        programs * (parts[0].loaded + stored) / gpu.bandwidth,
    )
