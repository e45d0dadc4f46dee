"""Python's share of an inference call: the model against its tensor work written out by hand.

    python -m benchmarks.call_overhead

The model is so small that nothing else matters. Rounds of both take turns; medians over rounds.
"""

from __future__ import annotations

import statistics
import timeit

import torch

from looped_fast import LoopedTransformer, ModelConfig
from looped_fast.ops import cpu_engine, reference

ROUNDS, CALLS = 300, 100


def main() -> None:
    """Print microseconds of a call, of its tensor work, and of the Python around that."""
    if reason := cpu_engine.unsupported_precision("fp32"):
        raise SystemExit(f"no CPU engine: {reason}")
    torch.set_num_threads(1)
    model = LoopedTransformer(ModelConfig(n_embd=32, n_head=4, n_loops=1, window=1))
    xs, ys = torch.randn(1, 2, 20), torch.randn(1, 2)
    weights = [*model._backbone.op_weights(), *model._read_out.parameters()]
    positions = model._backbone.positions[:4]
    read_in = tuple(model._read_in.parameters())
    arguments = (weights, 4, 1, 1, "add", "fp32")

    def by_hand() -> torch.Tensor:
        finite = (xs.sum() + ys.sum()).isfinite()
        embeddings = reference.read_in(xs, ys, *read_in)
        state = torch.zeros_like(embeddings)
        infer = torch.ops.looped_fast.cpu_loop_infer
        predictions = infer(embeddings, positions, state, *arguments)
        return predictions[:, :, ::2].squeeze(-1) if finite else predictions

    with torch.no_grad():
        assert torch.equal(by_hand(), model(xs, ys))
        rounds = [
            [
                timeit.timeit(call, number=CALLS) / CALLS * 1e6
                for call in (by_hand, lambda: model(xs, ys))
            ]
            for _ in range(ROUNDS)
        ]
    hand, call = (statistics.median(times) for times in zip(*rounds, strict=True))
    python = statistics.median(b - a for a, b in rounds)
    print(f"a call {call:.0f} us, its tensor work {hand:.0f}, Python around it {python:.0f}")


if __name__ == "__main__":
    main()
