"""Processes that train one model together, started by torchrun, or a single one; their devices.

Each process draws its own batch, and DistributedDataParallel averages the gradients. Processes
agree here on errors and stops, so that none waits in a collective for one that has exited.

Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from looped_fast import errors

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model; by default it is the only one.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes on all machines.
        local_rank: number of this process among those on its machine, from 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True if this process prints and writes files."""
        return self.rank == 0

    def gather(self, *numbers: float) -> list[list[float]]:
        """Gather the numbers of all processes by rank. A collective: every process must call it."""
        if self.world_size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: no GPU's stream waits
        everyones = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyones, own)
        return [each.tolist() for each in everyones]

    def mean(self, *numbers: float) -> list[float]:
        """Average each number over processes, to the same bits on all. A collective."""
        return [
            sum(column) / self.world_size for column in zip(*self.gather(*numbers), strict=True)
        ]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """End every process if one of them raises in the block, which holds no collectives.

        Raises:
            SystemExit: one of several processes raised in the block; all exit with the status of
                the first by rank, which has printed its error. A single process gets the error.
        """
        if self.world_size == 1:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except (Exception, SystemExit) as error:
            failure = error
        failed = [rank for rank, (bad,) in enumerate(self.gather(failure is not None)) if bad]
        if not failed:
            return
        status = 1
        if isinstance(failure, SystemExit):  # from a parser, which has printed its message
            status = failure.code if isinstance(failure.code, int) else 1
        elif failure is not None and self.rank == failed[0]:
            status = errors.report(failure)
        # Exit after the message is printed: torchrun kills the others once one has exited.
        raise SystemExit(int(self.gather(status)[failed[0]][0])) from failure

    def broadcast(self, work: Callable[[], T]) -> T:
        """Run ``work()`` in the main process; return its result, which must pickle, in all.

        Raises as ``failing_together`` does.
        """
        result: list[T | None] = [None]
        with self.failing_together():
            if self.is_main:
                result = [work()]
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return result[0]  # type: ignore[return-value]

    def own_device(self, device: torch.device) -> torch.device:
        """``device``, or with several processes this one's own GPU, made the current device.

        Raises:
            ValueError: ``device`` names one GPU by number, or there are too few GPUs.
        """
        if self.world_size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(
                f"device '{device}' is one GPU, and each of the {self.world_size} processes needs "
                f"its own; use --device cuda"
            )
        n_gpus = torch.cuda.device_count()
        if self.local_rank >= n_gpus:
            raise ValueError(
                f"LOCAL_RANK = {self.local_rank}, but PyTorch sees {n_gpus} CUDA devices here, and "
                f"each process needs its own; use torchrun --nproc-per-node {n_gpus}, or "
                f"--device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def average_gradients(self, module: nn.Module, *, some_unused: bool) -> nn.Module:
        """Wrap ``module`` so that its backward averages gradients over processes.

        Parameters become those of the main process. Every process must call this at the same
        point. A single process gets ``module`` back.

        Args:
            module: its forward returns a scalar loss, and it has no gradients yet.
            some_unused: True if some parameters may get no gradient.
        """
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=some_unused)


def single_process() -> Processes:
    """This process by itself, for work that is not shared.

    Raises:
        ValueError: torchrun started several, which would all do the same.
    """
    if (world_size := _from_environment("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"WORLD_SIZE = {world_size}: of all commands only looped_fast.train runs in several "
            f"processes; start this one without torchrun"
        )
    return Processes()


def resolve_device(name: str) -> torch.device:
    """The device ``name``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one of PyTorch's; use cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} "
            f"CUDA devices here; use --device cpu"
        )
    return device


@contextlib.contextmanager
def join() -> Iterator[Processes]:
    """Join the processes that torchrun started, or continue as a single one without torchrun.

    Inside, only the main process writes to standard output. The process group uses gloo for tensors
    on CPUs and NCCL for those on GPUs.

    Raises:
        ValueError: there are several processes, but a variable of torchrun's is not set.
        RuntimeError: the processes did not connect.
    """
    world_size = _from_environment("WORLD_SIZE", 1)
    if world_size == 1:
        yield Processes()
        return
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE = {world_size}, but {', '.join(missing)} not set; start with torchrun "
            f"--nproc-per-node {world_size} -m looped_fast.train, or unset WORLD_SIZE"
        )
    rank, local_rank = _from_environment("RANK"), _from_environment("LOCAL_RANK")
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", init_method="env://")
    try:
        with contextlib.ExitStack() as stack:
            if rank != 0:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            processes = Processes(rank, world_size, local_rank)
            try:
                yield processes
            except SystemExit:  # raised on all processes by ``failing_together``
                processes.gather(0)
                raise
            processes.gather(0)  # all have closed their files: torchrun kills the rest if one fails
    finally:
        dist.destroy_process_group()
        # Shortly after a collective, gloo's unjoined threads release its tensors. They take the GIL
        # for that, and abort the process if the interpreter is shutting down by then.
        time.sleep(0.1)


def _from_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name} = {text!r} in the environment: a whole number is needed, as torchrun sets it"
        ) from None
