# %% [markdown]
# # Looking inside, loop by loop
# `lr-small` has learned linear regression in 5 dimensions with 12 loops. `states` returns its state
# after every loop, and `read_out` what it would predict from each: when does it know?

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from looped_fast import from_pretrained, pretrained
from looped_fast.tasks import sample_batch

model, config = from_pretrained("lr-small"), pretrained.train_config("lr-small")
task = config.make_task()
xs, ys = sample_batch(task, 256, config.n_points, seed=0, step=0)
with torch.no_grad():
    states = model.states(xs, ys, n_loops=24, window=24)  # [24, 256, 32, 64]: x and y tokens
    predictions = model.read_out(states)  # [24, 256, 16]
errors = (predictions - ys).square().mean(1) / task.variance  # [24, 16]

# %% [markdown]
# With fewer than 5 examples no method can know the weights. With more, each loop gets closer to
# them, and the loops after the twelfth, which it was never trained with, change little.

# %%
for loop in (1, 3, 6, 12, 24):
    few, many = errors[loop - 1, 2], errors[loop - 1, 15]
    print(f"after {loop:2} loops: error {few:.2f} with 2 examples, {many:.3f} with 15")
moved = states.diff(dim=0).norm(dim=-1) / states[1:].norm(dim=-1)  # [23, 256, 32]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
extent = (0.5, 24.5, -0.5, 15.5)
image = left.imshow(errors.T.log10(), "cividis", aspect="auto", origin="lower", extent=extent)
figure.colorbar(image, label="log10 of squared error / variance")
left.set(xlabel="loops", ylabel="examples seen")
loops = torch.arange(1, 25)
right.semilogy(loops[1:], moved[..., ::2].mean((1, 2)), color="#c04f00", label="x tokens")
right.semilogy(loops[1:], moved[..., 1::2].mean((1, 2)), color="#0a4a86", label="y tokens")
right.axvline(12, color="#676d75", linestyle=":", label="trained with 12 loops")
right.set(xlabel="loops", ylabel="change of state / norm of state")
right.legend(frameon=False)
right.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(os.environ.get("PICTURES", ".")) / "examples-looking-inside.png", dpi=110)
