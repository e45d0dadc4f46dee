"""The loop as one differentiable PyTorch op, and the backends that run it."""

from looped_fast.ops.op import loop, loop_mse, read_in

__all__ = ["loop", "loop_mse", "read_in"]
