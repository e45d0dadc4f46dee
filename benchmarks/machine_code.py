"""Compiles a recorded kernel launch for a GPU that is not there, and measures its machine code."""

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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from looped_fast.kernels.launch import Launch

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    block_shared: int  # bytes of shared memory that one thread block may have
    sm_shared: int  # and all that run at a time
    warps: int
    blocks: int


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(163 * KIB, 164 * KIB, warps=64, blocks=32),
    "sm_89": Architecture(99 * KIB, 100 * KIB, warps=48, blocks=24),
    "sm_90": Architecture(227 * KIB, 228 * KIB, warps=64, blocks=32),
    "sm_100": Architecture(227 * KIB, 228 * KIB, warps=64, blocks=32),
    "sm_120": Architecture(99 * KIB, 100 * KIB, warps=48, blocks=24),
    # A compute unit; AMD's own tools say how many warps it holds.
    "gfx942": Architecture(64 * KIB, 64 * KIB, warps=0, blocks=0),
}
_SM_REGISTERS = 64 * KIB
_REGISTER_UNIT = 256  # registers of a warp are allotted in such steps
_RESERVED_SHARED = KIB  # taken by the system from every thread block's share
_SIMDS = 4  # in a compute unit; occupancy is in warps of one
_SM_TENSOR_MEMORY = 512  # columns; sm_100 alone has it


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one launch needs and does; counts are of instructions, static."""

    registers: int  # of a thread
    spills: int  # loads and stores of local memory, which hold registers that did not fit
    spills_in_loop: int
    shared: int  # bytes of a thread block
    products: int  # of matrices, in the kernel's source
    tensor_core: int  # matrix products
    async_copy: int  # global to shared memory, past the registers
    special_function: int  # exp2, reciprocal, square root, ...
    duplication: float  # tensor-core work issued / needed: 2 where two warps compute the same tile
    blocks_per_sm: int
    instructions: int

    def asdict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def compile_launch(launch: Launch, arch: str) -> MachineCode | str:
    """Machine code of ``launch`` on ``arch`` (of ``ARCHITECTURES``), or why it does not compile."""
    amd = arch.startswith("gfx")
    target = (
        GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    )
    try:
        compiled = triton.compile(
            _source(launch),
            target=target,
            options={
                "num_warps": launch.config.num_warps,
                "num_stages": launch.config.num_stages,
                "enable_fp_fusion": True,
            },
        )
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    measured = measure_amd if amd else measure
    return measured(compiled.asm, compiled.metadata, ARCHITECTURES[arch])


def _source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    return ASTSource(launch.kernel, signature, launch.constexprs, attributes)


def measure(asm: dict[str, Any], metadata: Any, arch: Architecture) -> MachineCode:
    """Count in the cubin, and in the representations of Triton's own that led to it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", resources)[-1])
    code, loops = parse(assembly)
    counts = Counter(name for _, name in code)
    spills = [address for address, name in code if name in ("LDL", "STL")]

    def count(pattern: str) -> int:
        return sum(n for name, n in counts.items() if re.fullmatch(pattern, name))

    return MachineCode(
        registers=registers,
        spills=len(spills),
        spills_in_loop=sum(any(a <= spill <= b for a, b in loops) for spill in spills),
        shared=metadata.shared,
        products=len(re.findall(r"= tt\.dot ", asm["ttir"])),
        tensor_core=count(r"[HIDQO]?G?MMA|UTC\w*MMA"),
        async_copy=count(r"LDGSTS|UTMALDG|UBLKCP"),
        special_function=count("MUFU"),
        duplication=duplication(asm["ttgir"]),
        blocks_per_sm=_blocks_per_sm(registers, metadata, arch),
        instructions=len(code),
    )


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True)
    return done.stdout


def parse(assembly: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Instructions (address, name) and loops (first address, last) of nvdisasm's output.

    A loop is a branch back. Those after the last EXIT are not: they are where a wait for an
    asynchronous operation tries again, out of line.
    """
    code, branches, labels, fresh = [], [], {}, []
    for line in assembly.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            fresh.append(label[1])
            continue
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line)
        if not found:
            continue
        address, name = int(found[1], 16), found[2]
        code.append((address, name))
        labels |= dict.fromkeys(fresh, address)
        fresh = []
        if name == "BRA" and (target := re.search(r"\.(L_x_\d+)", found[3])):
            branches.append((address, target[1]))
    end = max((address for address, name in code if name == "EXIT"), default=0)
    loops = [(labels[to], address) for address, to in branches if to in labels]
    return code, [(first, last) for first, last in loops if first < last < end]


def measure_amd(asm: dict[str, Any], metadata: Any, arch: Architecture) -> MachineCode:
    """The same of AMD's assembly, where the compiler says most of it in comments."""
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

    def said(name: str) -> int:
        return int(re.findall(rf"; {name}: (\d+)", assembly)[0])

    return MachineCode(
        registers=said("NumVgprs"),
        spills=len(spills),
        spills_in_loop=sum(any(a <= spill <= b for a, b in loops) for spill in spills),
        shared=metadata.shared,
        products=len(re.findall(r"= tt\.dot ", asm["ttir"])),
        tensor_core=count("v_mfma|v_smfmac"),
        async_copy=count(r"buffer_load_\w*lds|global_load_lds"),
        special_function=count("v_(exp|log|rcp|rsq|sqrt)_"),
        duplication=1.0,  # not looked for
        blocks_per_sm=min(
            said("Occupancy") * _SIMDS // metadata.num_warps,
            arch.sm_shared // max(1, metadata.shared),
        ),
        instructions=len(code),
    )


def duplication(ttgir: str) -> float:
    """Tensor-core work issued over work needed; 1 where no two warps compute the same tile.

    Chained products get all warps stacked along the rows: with fewer than 16 rows for each, warps
    repeat each other's rows (columns likewise, in instructions of 8). Products that work in tensor
    memory (sm_100) are issued once whatever the layout.
    """
    layouts = {
        name: (int(version), int(rows), int(columns))
        for name, version, rows, columns in re.findall(
            r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = (\d).*?warpsPerCTA = \[(\d+), (\d+)\]",
            ttgir,
            re.MULTILINE,
        )
    }
    needed = issued = 0.0
    for a_columns, rows, columns, layout in re.findall(
        r"(?:tt\.dot|warp_group_dot) .*?: \S*?<\d+x(\d+)x.*-> tensor<(\d+)x(\d+)xf32, (#\w+)>",
        ttgir,
    ):
        if layout not in layouts:
            continue
        version, row_warps, column_warps = layouts[layout]
        work = int(a_columns) * int(rows) * int(columns)
        factor = max(1, 16 * row_warps / int(rows))
        if version == 2:
            factor *= max(1, 8 * column_warps / int(columns))
        needed += work
        issued += work * factor
    return round(issued / needed, 2) if needed else 1.0


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
