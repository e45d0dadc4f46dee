"""The loop as one differentiable PyTorch op, and the backends that run it."""

from looped_fast.ops.call import LoopSettings
from looped_fast.ops.op import loop, loop_mse
from looped_fast.ops.prompt import read_in

__all__ = ["LoopSettings", "loop", "loop_mse", "read_in"]
