# %% [markdown]
# # Loops that stop when they are enough
# With a tolerance, `predict` stops each prompt once none of its predictions moves by more than that
# from one loop to the next. Nobody needs to know how many loops a model or a prompt needs.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from looped_fast import from_pretrained, pretrained
from looped_fast.tasks import sample_batch

model, config = from_pretrained("lr-small"), pretrained.train_config("lr-small")
task, most = config.make_task(), 48
xs, ys = sample_batch(task, 256, 40, seed=0, step=0)
examples, queries, truth = (xs[:, :15], ys[:, :15]), xs[:, 15:], ys[:, 15:]  # 15 and 25 points


def error(predictions):
    """Squared error / variance, mean over queries and prompts: [..., B, m] -> [...]."""
    return (predictions - truth).square().mean((-2, -1)) / task.variance


# %% [markdown]
# First the same loops for every prompt; then tolerances, with 48 loops at most. `lr-small` was
# trained with 12 loops: its error is lowest near them, and a fine tolerance buys nothing more.

# %%
fixed = error(model.predict(*examples, queries, n_loops=most, window=most))  # [48]
adaptive = {}
for tolerance in (1.0, 0.3, 0.1, 0.03, 0.01):
    predictions, n_loops = model.predict(*examples, queries, tolerance=tolerance, max_loops=most)
    adaptive[tolerance] = n_loops, error(predictions)
    used = f"{n_loops.float().mean():.1f} loops on average, {n_loops.min()} to {n_loops.max()}"
    print(f"tolerance {tolerance}: error {adaptive[tolerance][1]:.4f} after {used}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
loops = torch.arange(1, most + 1)
left.hist(adaptive[0.3][0], bins=torch.arange(1, most + 2) - 0.5, color="#c04f00")
left.set(xlabel="loops until tolerance 0.3", ylabel="prompts")
right.semilogy(loops, fixed, color="#676d75", label="the same loops for every prompt")
means = [n_loops.float().mean() for n_loops, _ in adaptive.values()]
right.semilogy(means, [e for _, e in adaptive.values()], "o", color="#c04f00", label="tolerance")
for (tolerance, (_, e)), mean in zip(adaptive.items(), means, strict=True):
    right.annotate(f" {tolerance}", (mean, e), color="#c04f00", va="bottom")
right.set(xlabel="loops, mean over prompts", ylabel="squared error / variance", xlim=(0, 30))
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(os.environ.get("PICTURES", ".")) / "examples-enough-loops.png", dpi=110)
