"""All launches there can be, found by running the loop's host code and recording its kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from looped_fast.kernels.few_rows import MAX_ROWS
from looped_fast.kernels.launch import Launch, recording
from looped_fast.kernels.read_in import read_in
from torch import Tensor

from looped_fast.ops import triton_backend
from looped_fast.ops.block import GPT2, TRM, Block, block_names, final_names, shape_of
from looped_fast.ops.call import LoopSettings

WIDTHS = (64, 128, 256, 512)
HEAD_DIMS = (16, 32, 64)
PRECISIONS = ("bf16", "fp16", "fp32", "tf32")
PAPER_WIDTH = 256
TILES = ("ROWS", "HIDDEN_CHUNK", "COLUMNS")  # constexprs that a Config gives


class Loop(NamedTuple):
    """A loop to launch; together ``LOOPS`` launch every form of every kernel."""

    injection: str
    n_layer: int
    n_loops: int
    window: int
    training: bool = True
    recompute: bool = False  # launches the same as a window in several chunks
    n_outputs: int = 1  # of the read-out; 0 for states
    n_supervised: int = 2  # last steps in the op's loss, in training; 0 without it
    block: Block = GPT2  # of TRM's, whose hidden width is 3 D


_OF_TRM = {"n_outputs": 0, "block": TRM}  # without a read-out in the kernels


LOOPS = (
    Loop("add", 1, 4, 2),
    Loop("add", 1, 4, 2, n_supervised=1),
    Loop("add", 1, 4, 2, n_supervised=0),
    Loop("add", 2, 2, 2, n_outputs=0),
    Loop("mul", 2, 4, 2),
    Loop("none", 1, 4, 2),
    Loop("every_block", 2, 4, 2),
    Loop("add", 2, 4, 2, recompute=True),
    Loop("mul", 2, 4, 2, recompute=True),
    Loop("every_block", 2, 4, 2, recompute=True),
    Loop("add", 2, 3, 1, training=False),
    Loop("mul", 2, 3, 1, training=False),
    Loop("every_block", 2, 3, 1, training=False),
    Loop("mul", 1, 4, 2, **_OF_TRM),
    Loop("add", 2, 4, 2, **_OF_TRM),
    Loop("add", 2, 4, 2, recompute=True, **_OF_TRM),
    Loop("add", 2, 3, 1, training=False, **_OF_TRM),
    Loop("add", 1, 4, 2, n_outputs=0, block=TRM._replace(positions="none")),
)


def weights_of(n_layer: int, D: int, block: Block = GPT2) -> list[Tensor]:
    """Zero weights for ``ops.loop``."""
    sizes = D, block.hidden(D), block.fc_width(D)
    names = [*block_names(block) * n_layer, *final_names(block)]
    return [torch.zeros(shape_of(name, *sizes)) for name in names]


def launches_of(
    loop: Loop, precision: str, batch: int, seq_len: int, width: int, head_dim: int
) -> tuple[list[Launch], list[Launch]]:
    """Launches of the forward and of the backward of a loop on CPU tensors; no kernel runs."""
    if reason := triton_backend.load_error():
        raise RuntimeError(reason)
    block = loop.block
    if block.mlp == "swiglu":
        block = block._replace(mlp_hidden=3 * width)
    embeddings = torch.empty(batch, seq_len, width)
    positions = {
        "learned": torch.empty(seq_len, width), "rotary": torch.empty(2, seq_len, head_dim),
        "none": None,
    }[block.positions]  # fmt: skip
    weights = weights_of(loop.n_layer, width, block)
    n = loop.n_outputs
    read_out = [torch.zeros(n, width), torch.zeros(n)] if n else []
    targets, n_supervised = None, None
    if n and loop.training and loop.n_supervised:
        n_supervised = min(loop.n_supervised, loop.window)
        targets = torch.empty(batch, (seq_len + 1) // 2, n)
    embeddings.requires_grad_(loop.training)  # alone: PyTorch computes those of weights
    # As a model starts; TRM's has states of its own.
    has_state = block.positions != "learned" or loop.injection not in ("add", "mul")
    state = embeddings if has_state else None
    settings = LoopSettings(
        width // head_dim, loop.n_loops, loop.window, loop.injection,
        "fp32" if precision == "tf32" else precision, loop.recompute, attention="triton",
        block=block,
    )  # fmt: skip
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with recording(execute=False) as forward:
            result = triton_backend.loop(
                embeddings, positions, state, weights, settings, read_out, targets, n_supervised
            )
        with recording(execute=False) as backward:
            if loop.training:
                result.backward(torch.empty_like(result))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return forward, backward


class Case(NamedTuple):
    """A launch whose machine code differs from all others, apart from its Config."""

    kernel: str
    width: int  # D, or head_dim for attention, where D is only a stride
    precision: str
    form: str  # tells apart launches of a kernel that are equal in all of the above
    launch: Launch


@functools.cache
def cases(precision: str) -> tuple[Case, ...]:
    """All cases at a precision."""
    found: dict[tuple[str, int, str, str], Case] = {}

    def add(launches: list[Launch], width: int) -> None:
        for launch in launches:
            is_attention = launch.name.startswith("attention_")
            size = launch.constexprs["HEAD_DIM"] if is_attention else width
            case = Case(launch.name, size, precision, form_of(launch), launch)
            found.setdefault(case[:4], case)

    widths = [width for width in WIDTHS if (precision, width) != ("tf32", 512)]  # refused
    runs = [(loop, 1, width, min(HEAD_DIMS)) for width in widths for loop in LOOPS]
    masks = LOOPS[0], next(loop for loop in LOOPS if loop.block.mask == "full")
    runs += [(loop, 1, max(widths), head_dim) for head_dim in HEAD_DIMS for loop in masks]
    # Sizes without common divisors, so that no alignment is accidental.
    seq_len = 10
    many = MAX_ROWS // seq_len + 1  # sequences
    unsaved = [loop for loop in LOOPS if not loop.training or loop.recompute]
    runs += [(loop, many, width, min(HEAD_DIMS)) for width in widths for loop in unsaved]
    for loop, batch, width, head_dim in runs:
        forward, backward = launches_of(loop, precision, batch, seq_len, width, head_dim)
        add(forward + backward, width)
    for width in widths:
        with recording(execute=False) as launches:
            read_in(
                torch.empty(1, 5, 3), torch.empty(1, 5), torch.empty(width, 3), torch.empty(width)
            )
        add(launches, width)
    return tuple(found.values())


def form_of(launch: Launch) -> str:
    """Name that tells apart launches of a kernel that differ at equal sizes and types."""
    sizes = {*TILES, "D", "HIDDEN", "HEAD_DIM", "TF32"}
    parts = [f"{k}={v}" for k, v in launch.constexprs.items() if k not in sizes and v is not None]
    absent = [name for name, value in launch.constexprs.items() if value is None]
    unaligned = [
        name for name, kind in launch.types.items()
        if kind.startswith("*") and name not in launch.aligned
    ]  # fmt: skip
    parts += [f"without {' '.join(absent)}"] if absent else []
    parts += [f"unaligned {' '.join(unaligned)}"] if unaligned else []
    return ", ".join(parts)
