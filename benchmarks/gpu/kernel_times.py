"""Time of a training step by kernel."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Contender
from benchmarks.gpu.configurations import forced
from benchmarks.gpu.visit import Visit, say
from benchmarks.workload import Workload

SHOWN = 22


def run(visit: Visit) -> None:
    """Profile a replayed step of LR with the best configurations that ``rows`` found."""
    activities = [ProfilerActivity.CPU]
    activities += [] if visit.dry else [ProfilerActivity.CUDA]
    contender = Contender("triton", "bf16", fused_loss=True, graphs=not visit.dry)
    with forced(visit.best_configs("lr")):
        step = Workload(visit.case("lr"), contender, "training", device=visit.device.type)
        for _ in range(1 if visit.dry else 4):
            step()
        with profile(activities=activities) as profiler:
            step()
            if not visit.dry:
                torch.cuda.synchronize()
    found = sorted(
        (
            (event.self_device_time_total, event.count, event.key)
            for event in profiler.key_averages()
            if visit.dry or event.self_device_time_total
        ),
        reverse=True,
    )
    for us, count, name in found[:SHOWN]:
        say(f"{us:9.0f} us {count:5} x {name[:70]}")
    total, launches = sum(us for us, *_ in found), sum(count for _, count, _ in found)
    say(f"{total:9.0f} us in {launches} kernels and copies")
    visit.save("profile", us_count_kernel=found, total_us=total)
