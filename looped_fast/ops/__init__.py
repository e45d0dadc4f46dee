"""The loop as one differentiable PyTorch op, and the backends that run it."""

from looped_fast.ops.block import GPT2, TRM, Block, block_names
from looped_fast.ops.call import LoopSettings, SharedWeights
from looped_fast.ops.op import loop, loop_mse
from looped_fast.ops.prompt import read_in

__all__ = [
    "GPT2", "TRM", "Block", "LoopSettings", "SharedWeights", "block_names", "loop", "loop_mse",
    "read_in",
]  # fmt: skip
