"""Split a compiled kernel into its straight-line code and its loops, and count what each does.

Instructions and shared memory are counted in the machine code; global memory, matrix products and
how often a loop runs, in Triton's representations of the same kernel, which have shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Phase(NamedTuple):
    """Straight-line code of a kernel, or one pass through a loop; bytes are per program."""

    trips: int  # passes through the loop; 1 outside loops, 0 if the sequence's length decides
    instructions: int  # of a warp
    spills: int  # of these; loads and stores of local memory
    shared: int  # bytes of shared memory that are read and written
    loaded: int  # bytes of global memory, and of local memory, where spills go
    stored: int
    flops: int  # of matrix products, as issued: repetition by warps counts


class Instruction(NamedTuple):
    """An instruction of an NVIDIA GPU, as nvdisasm prints it."""

    address: int
    name: str
    rest: str  # modifiers and operands


Loop = tuple[int, int]  # addresses of its first and last instruction


def parse(assembly: str) -> tuple[list[Instruction], list[Loop]]:
    """Instructions and loops of nvdisasm's output.

    A loop is a branch back, except after the last EXIT, where out-of-line waits for asynchronous
    operations try again.
    """
    code, branches, labels, fresh = [], [], {}, []
    for line in assembly.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            fresh.append(label[1])
            continue
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line)
        if not found:
            continue
        instruction = Instruction(int(found[1], 16), found[2], found[3])
        code.append(instruction)
        labels |= dict.fromkeys(fresh, instruction.address)
        fresh = []
        if instruction.name == "BRA" and (target := re.search(r"\.(L_x_\d+)", found[3])):
            branches.append((instruction.address, target[1]))
    end = max((i.address for i in code if i.name == "EXIT"), default=0)
    loops = [(labels[to], address) for address, to in branches if to in labels]
    return code, sorted((first, last) for first, last in loops if first < last < end)


def phases(assembly: str, ttir: str, ttgir: str, num_warps: int) -> list[Phase]:
    """The straight-line code, then each loop in order; empty if loops can't be told apart."""
    code, loops = parse(assembly)
    # Waits for asynchronous operations are loops without matrix products.
    loops = [loop for loop in loops if any(_computes(i) for i in code if _inside(i, loop))]
    loops = [a for a in loops if not any(b[0] <= a[0] and a[1] <= b[1] and a != b for b in loops)]
    source, lowered = list(_blocks(ttir)), list(_blocks(ttgir))
    if not len(loops) == len(source) - 1 == len(lowered) - 1:
        return []
    layouts = _layouts(ttgir)
    found = []
    for loop, (trips, lines), (passes, products) in zip(
        [None, *loops], source, lowered, strict=True
    ):
        instructions = [
            i for i in code
            if (_inside(i, loop) if loop else not any(_inside(i, other) for other in loops))
        ]  # fmt: skip
        dots = [dot for line in products if (dot := _dot(line, layouts))]
        loaded, stored = _bytes_of("load", lines), _bytes_of("store", lines)
        found.append(
            Phase(
                trips=passes,
                instructions=len(instructions),
                spills=sum(i.name in SPILLS for i in instructions),
                shared=num_warps * sum(map(_shared_bytes, instructions))
                + sum(dot.operands for dot in dots),
                loaded=loaded + num_warps * _local_bytes("LDL", instructions),
                stored=stored + num_warps * _local_bytes("STL", instructions),
                flops=sum(dot.issued for dot in dots),
            )
        )
        if trips > passes > 0:  # the pipeliner took the first passes out of the loop
            peeled = trips - passes
            found[0] = found[0]._replace(
                loaded=found[0].loaded + peeled * loaded, stored=found[0].stored + peeled * stored
            )
    return found


SPILLS = ("LDL", "STL")


def _inside(instruction: Instruction, loop: Loop) -> bool:
    return loop[0] <= instruction.address <= loop[1]


def _computes(instruction: Instruction) -> bool:
    return re.fullmatch(r"\w*MMA|FFMA2?|DFMA", instruction.name) is not None


def _shared_bytes(instruction: Instruction) -> int:
    """Bytes that one warp moves through shared memory or L1; for tensor cores see ``_dot``."""
    name, modifiers = instruction.name, instruction.rest.split(" ")[0]
    if name in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits
        several = re.search(r"88\.(\d)", modifiers)
        return 128 * (int(several[1]) if several else 1)
    if name in ("LDS", "STS", "LDGSTS", *SPILLS):
        return 32 * _width(modifiers)
    return 0


def _width(modifiers: str) -> int:
    """Bytes that each of a warp's 32 threads reads or writes."""
    width = re.search(r"\.(128|64)", modifiers)
    return int(width[1]) // 8 if width else 4


def _local_bytes(name: str, instructions: list[Instruction]) -> int:
    return sum(32 * _width(i.rest.split(" ")[0]) for i in instructions if i.name == name)


def _blocks(ir: str) -> Iterator[tuple[int, list[str]]]:
    """(trips, lines) outside of loops, then of each outermost loop of Triton's representation."""
    outside: list[str] = []
    loops: list[tuple[int, list[str]]] = []
    indent = ""
    for line in ir.splitlines():
        if not indent and (loop := re.match(r"(\s+).*scf\.for \S+ = (\S+) to (\S+) step", line)):
            indent = loop[1]
            step = re.search(r"step (\S+)", line)
            bounds = [re.fullmatch(r"%c(\d+)_i32", text) for text in (loop[2], loop[3], step[1])]
            trips = 0
            if all(bounds):
                first, end, by = (int(bound[1]) for bound in bounds)
                trips = -(-(end - first) // by)
            loops.append((trips, []))
        elif indent and line.startswith(indent + "}"):
            indent = ""
        else:
            (loops[-1][1] if indent else outside).append(line)
    yield 1, outside
    yield from loops


_SIZES = {"f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i8": 1, "i1": 1}


def _bytes_of(access: str, lines: list[str]) -> int:
    total = 0
    for line in lines:
        if tile := re.search(rf"tt\.{access} .*?tensor<([\dx]+)x!tt\.ptr<(\w+)>", line):
            size = _SIZES[tile[2]]
            for extent in tile[1].split("x"):
                size *= int(extent)
            total += size
    return total


class _Dot(NamedTuple):
    needed: int  # operations
    issued: int
    operands: int  # bytes of shared memory that the tensor cores read themselves


class _Layout(NamedTuple):
    version: int  # 2: mma.sync, 3: wgmma
    row_warps: int
    column_warps: int
    columns: int  # of one instruction


def _layouts(ttgir: str) -> dict[str, _Layout]:
    found = re.findall(
        r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = (\d).*?warpsPerCTA = \[(\d+), (\d+)\]"
        r".*?instrShape = \[\d+, (\d+)",
        ttgir,
        re.MULTILINE,
    )
    return {name: _Layout(*map(int, values)) for name, *values in found}


def _dot(line: str, layouts: dict[str, _Layout]) -> _Dot | None:
    """Matrix product of a line of Triton's GPU representation, if it is for tensor cores.

    Chained products get all warps stacked along the rows: with fewer than 16 rows for each, warps
    repeat each other's rows (columns likewise, in instructions of 8 by mma.sync).
    """
    found = re.search(r"(tt\.dot|warp_group_dot|tc_gen5_mma) .*? : (\S*<.*)", line)
    if not found:
        return None
    types = re.findall(r"(?:tensor|memdesc)<(\d+)x(\d+)x(\w+)", found[2])
    (rows, inner), columns = map(int, types[0][:2]), int(types[1][1])
    size, needed = _SIZES[types[0][2]], 2 * rows * inner * columns
    in_shared = "#smem" in found[2].split("*" if found[1] != "tc_gen5_mma" else ">,")[0]
    a, b = in_shared * rows * inner * size, columns * inner * size
    if found[1] == "tc_gen5_mma":  # 128 rows by up to 256 columns; fewer rows take as long
        high = -(-rows // 128)
        return _Dot(needed, max(1, 128 * high // rows) * needed, a * -(-columns // 256) + b * high)
    layout = layouts.get(re.findall(r"xf32, (#\w+)>", found[2])[-1])
    if not layout:
        return None
    repeats = max(1, 16 * layout.row_warps // rows)
    if layout.version == 2:
        repeats *= max(1, 8 * layout.column_warps // columns)
        return _Dot(needed, repeats * needed, 0)  # operands come from registers
    # Four warps read 64 rows of a, and the columns of one instruction of b.
    a *= repeats * -(-columns // layout.columns)
    return _Dot(needed, repeats * needed, a + b * -(-rows * repeats // 64))


def duplication(ttgir: str) -> float:
    """Tensor-core work issued over work needed; 1 if no two warps compute the same tile.

    Products in tensor memory (sm_100) are issued once, whatever the layout.
    """
    layouts = _layouts(ttgir)
    lines = [line for line in ttgir.splitlines() if "tc_gen5_mma" not in line]
    dots = [dot for line in lines if (dot := _dot(line, layouts))]
    needed = sum(dot.needed for dot in dots)
    return round(sum(dot.issued for dot in dots) / needed, 2) if needed else 1.0
