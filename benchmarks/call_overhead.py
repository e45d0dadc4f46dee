"""Python around an inference call: a tiny model against its tensor work, written out by hand.

python -m benchmarks.call_overhead
"""

from __future__ import annotations

import statistics
import timeit

import torch

from looped_fast import LoopedTransformer, ModelConfig

ROUNDS, CALLS = 300, 100


def main() -> None:
    """Print medians over rounds, in which both take turns, in microseconds."""
    torch.set_num_threads(1)
    model = LoopedTransformer(ModelConfig(n_embd=32, n_head=4, n_loops=1, window=1), "cpu")
    xs, ys = torch.randn(1, 2, 20), torch.randn(1, 2)
    positions, weights = model._backbone.op_tensors()
    weights += model._read_out.parameters()
    positions, settings = positions[:4], (4, 1, 1, "add", "fp32", "gpt2", 4 * 32, "causal", 1e-5)

    def by_hand() -> torch.Tensor:
        assert (xs.sum() + ys.sum()).isfinite()
        e = torch.ops.looped_fast.cpu_read_in(xs, ys, *model._read_in.parameters())
        infer = torch.ops.looped_fast.cpu_loop_infer
        return infer(e, positions, torch.zeros_like(e), weights, *settings)[:, :, ::2].squeeze(-1)

    with torch.no_grad():
        assert torch.equal(model(xs, ys), by_hand())
        calls = (by_hand, lambda: model(xs, ys))
        rounds = [[timeit.timeit(f, number=CALLS) / CALLS for f in calls] for _ in range(ROUNDS)]
    hand, call = (1e6 * statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"a call {call:.0f} us: tensor work {hand:.0f}, Python around it {call - hand:.0f}")


if __name__ == "__main__":
    main()
