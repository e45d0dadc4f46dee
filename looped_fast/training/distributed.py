"""Processes that train one model together, started by torchrun, or a single one; their devices.

Each process draws its own batch, and DistributedDataParallel averages their gradients. Errors and
stops are agreed on here, so that no process waits in a collective for one that has left.

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
        rank: its number, from 0.
        world_size: how many there are, on all machines.
        local_rank: its number on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True in the process that prints and writes files."""
        return self.rank == 0

    def gather(self, *numbers: float) -> list[list[float]]:
        """The numbers of every process, by rank. A collective: every process must call it."""
        if self.world_size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: a GPU's stream goes on
        everyones = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyones, own)
        return [each.tolist() for each in everyones]

    def mean(self, *numbers: float) -> list[float]:
        """The mean over processes of each number, the same bits on all. A collective."""
        return [
            sum(column) / self.world_size for column in zip(*self.gather(*numbers), strict=True)
        ]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """End every process if one of them raises in the block, which holds no collectives.

        Raises:
            SystemExit: with several processes, on each of them, if one raised in the block. The
                first that did has printed its error. A single process gets the
                error itself.
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
        # After the message is out: torchrun kills the others as soon as one has gone.
        raise SystemExit(int(self.gather(status)[failed[0]][0])) from failure

    def broadcast(self, work: Callable[[], T]) -> T:
        """The result of ``work()``, done by the main process for all; it must pickle.

        Raises as ``failing_together``.
        """
        result: list[T | None] = [None]
        with self.failing_together():
            if self.is_main:
                result = [work()]
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return result[0]  # type: ignore[return-value]

    def own_device(self, device: torch.device) -> torch.device:
        """``device``, or this process's own among several GPUs, which becomes the current one.

        Raises:
            ValueError: one GPU is asked for by number, or there are fewer than processes.
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
        """``module``, whose backward from now on gives means of gradients over the processes.

        Parameters become those of the main process. All must call it, at one place. A process by
        itself gets ``module`` back.

        Args:
            module: with a scalar loss as its forward's result, and no gradients yet.
            some_unused: whether parameters may get no gradient.
        """
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=some_unused)


def single_process() -> Processes:
    """This process, for work that is not shared.

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
    """``auto`` is the GPU where there is one.

    Raises:
        ValueError: no such device here.
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
    """Join the processes that torchrun started, or go on as a single one where it did not.

    Within, the standard output of all but the main process goes nowhere. The process group
    has gloo for tensors on CPUs and NCCL for those on GPUs.

    Raises:
        ValueError: there are several processes, but the environment does not say how to meet.
        RuntimeError: they did not meet.
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
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            processes = Processes(rank, world_size, local_rank)
            try:
                yield processes
            except SystemExit:  # on all processes: see ``failing_together``
                processes.gather(0)
                raise
            processes.gather(0)  # files are closed: torchrun kills the others once one has failed
    finally:
        dist.destroy_process_group()
        # A moment after a collective gloo's threads, which are not joined, release its tensors.
        # They take Python's lock for that, and abort the process if Python is ending by then.
        time.sleep(0.1)


def _from_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name} = {text!r} in the environment: a whole number is needed, as torchrun sets it"
        ) from None
