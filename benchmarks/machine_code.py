"""Compile a recorded kernel launch without a GPU, and measure its machine code."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from looped_fast.kernels.launch import Launch
from triton.compiler import ASTSource
from triton.errors import TritonError

from benchmarks.gpu.fake_driver import pretend, target_of
from benchmarks.phases import SPILLS, Phase, duplication, parse, phases

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    block_shared: int  # bytes of shared memory for one thread block
    sm_shared: int  # and for all that run at a time
    warps: int
    blocks: int


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(163 * KIB, 164 * KIB, warps=64, blocks=32),
    "sm_89": Architecture(99 * KIB, 100 * KIB, warps=48, blocks=24),
    "sm_90": Architecture(227 * KIB, 228 * KIB, warps=64, blocks=32),
    "sm_100": Architecture(227 * KIB, 228 * KIB, warps=64, blocks=32),
    "sm_120": Architecture(99 * KIB, 100 * KIB, warps=48, blocks=24),
    # A compute unit. AMD's compiler reports how many warps it holds.
    "gfx942": Architecture(64 * KIB, 64 * KIB, warps=0, blocks=0),
}
_SM_REGISTERS = 64 * KIB
_REGISTER_UNIT = 256  # registers of a warp are allocated in such steps
_RESERVED_SHARED = KIB  # taken by the system from every thread block's share
_SIMDS = 4  # in a compute unit; occupancy is in warps of one
_SM_TENSOR_MEMORY = 512  # columns; only sm_100 has it


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one launch needs and does; counts are of instructions, static."""

    registers: int  # of a thread
    spills: int  # loads and stores of local memory, which hold registers that did not fit
    spills_in_loop: int
    spill_share: float  # of the instructions in loops
    shared: int  # bytes of a thread block
    products: int  # of matrices, in the kernel's source
    tensor_core: int  # matrix products
    asynchronous_mma: bool  # tensor cores read shared memory themselves: wgmma, tcgen05
    async_copy: int  # global to shared memory, past the registers
    special_function: int  # exp2, reciprocal, square root, ...
    duplication: float  # tensor-core work issued / needed: 2 where two warps compute the same tile
    blocks_per_sm: int
    instructions: int
    phases: list[Phase]  # empty for AMD, and if loops can't be told apart

    def asdict(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self)


def compile_launch(launch: Launch, arch: str) -> MachineCode | str:
    """Machine code of ``launch`` on one of ``ARCHITECTURES``, or why it does not compile."""
    pretend(arch)  # kernels query their target
    try:
        compiled = triton.compile(
            _source(launch),
            target=target_of(arch),
            options={
                "num_warps": launch.config.num_warps,
                "num_stages": launch.config.num_stages,
                "enable_fp_fusion": True,
            },
        )
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    measured = measure_amd if arch.startswith("gfx") else measure
    return measured(compiled.asm, compiled.metadata, ARCHITECTURES[arch])


def _source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    return ASTSource(launch.kernel, signature, launch.constexprs, attributes)


def measure(asm: dict[str, Any], metadata: Any, arch: Architecture) -> MachineCode:
    """Count in the cubin, and in the Triton representations that it was made from."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", resources)[-1])
    code, loops = parse(assembly)
    counts = Counter(i.name for i in code)
    spills = [i.address for i in code if i.name in SPILLS]

    def count(pattern: str) -> int:
        return sum(n for name, n in counts.items() if re.fullmatch(pattern, name))

    return MachineCode(
        registers=registers,
        spills=len(spills),
        spills_in_loop=sum(any(a <= spill <= b for a, b in loops) for spill in spills),
        spill_share=_spill_share([i.address for i in code], loops, spills),
        shared=metadata.shared,
        products=len(re.findall(r"= tt\.dot ", asm["ttir"])),
        tensor_core=count(r"[HIDQO]?G?MMA|UTC\w*MMA"),
        asynchronous_mma=count(r"[HIQ]GMMA|UTC\w*MMA") > 0,
        async_copy=count(r"LDGSTS|UTMALDG|UBLKCP"),
        special_function=count("MUFU"),
        duplication=duplication(asm["ttgir"]),
        blocks_per_sm=_blocks_per_sm(registers, metadata, arch),
        instructions=len(code),
        phases=phases(assembly, asm["ttir"], asm["ttgir"], metadata.num_warps),
    )


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([_TOOLS / name, *args], capture_output=True, encoding="utf-8", check=True)
    return done.stdout


def _spill_share(code: list[int], loops: list[tuple[int, int]], spills: list[int]) -> float:
    """Share of ``spills`` in the instructions of loops; all by address, or by index."""

    def in_loops(addresses: list[int]) -> int:
        return sum(any(a <= address <= b for a, b in loops) for address in addresses)

    return round(in_loops(spills) / max(1, in_loops(code)), 4)


def measure_amd(asm: dict[str, Any], metadata: Any, arch: Architecture) -> MachineCode:
    """Count in AMD's assembly, where the compiler reports most of it in comments."""
    assembly = asm["amdgcn"]
    code, labels, branches = [], {}, []
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+([a-z]\w+)(.*)", line):
            if found[1].startswith(("s_cbranch", "s_branch")):
                branches.append((found[2].strip().split()[0], len(code)))
            code.append(found[1])
    loops = [(labels[to], at) for to, at in branches if to in labels and labels[to] < at]
    spills = [i for i, name in enumerate(code) if name.startswith("scratch_")]

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, name)) for name in code)

    def reported(name: str) -> int:
        return int(re.findall(rf"; {name}: (\d+)", assembly)[0])

    return MachineCode(
        registers=reported("NumVgprs"),
        spills=len(spills),
        spills_in_loop=sum(any(a <= spill <= b for a, b in loops) for spill in spills),
        spill_share=_spill_share(list(range(len(code))), loops, spills),
        shared=metadata.shared,
        products=len(re.findall(r"= tt\.dot ", asm["ttir"])),
        tensor_core=count("v_mfma|v_smfmac"),
        asynchronous_mma=False,
        async_copy=count(r"buffer_load_\w*lds|global_load_lds"),
        special_function=count("v_(exp|log|rcp|rsq|sqrt)_"),
        duplication=1.0,  # not looked for
        blocks_per_sm=min(
            reported("Occupancy") * _SIMDS // metadata.num_warps,
            arch.sm_shared // max(1, metadata.shared),
        ),
        instructions=len(code),
        phases=[],
    )


def _blocks_per_sm(registers: int, metadata: Any, arch: Architecture) -> int:
    warp_registers = math.ceil(32 * registers / _REGISTER_UNIT) * _REGISTER_UNIT
    limits = [
        arch.blocks,
        arch.warps // metadata.num_warps,
        _SM_REGISTERS // warp_registers // metadata.num_warps,
        arch.sm_shared // (metadata.shared + _RESERVED_SHARED),
    ]
    if getattr(metadata, "tmem_size", 0):
        limits.append(_SM_TENSOR_MEMORY // metadata.tmem_size)
    return min(limits)
