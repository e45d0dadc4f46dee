# %% [markdown]
# # Drop-in: a model that you already have, faster
# `accelerate` runs a model's whole loop as one fused op, in place: its parameters, state dict and
# results stay what they are. With a checkout of the official code in `LOOPED_TRANSFORMER` this is
# the official model; without, `looped_model.py` has one that somebody else might have written.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.utils.benchmark import Timer

import looped_fast

if checkout := os.environ.get("LOOPED_TRANSFORMER"):
    sys.path.insert(0, f"{checkout}/scripts")
    from models import TransformerModelLooped

    model = TransformerModelLooped(20, 101, n_embd=128, n_layer=1, n_head=4)
else:
    from looped_model import LoopedModel

    model = LoopedModel(20, 101, n_embd=128, n_head=4)

# %% [markdown]
# A training step has 12 loops, 6 of them with gradient; its loss is the mean over these.

# %%
xs, ys = torch.randn(16, 41, 20), torch.randn(16, 41)


def gradients():
    """Gradients of the loss by every parameter that it depends on."""
    predictions = torch.stack(model(xs, ys, 6, 12))
    parameters = [p for name, p in model.named_parameters() if "wte" not in name]
    return torch.autograd.grad((predictions - ys).square().mean(), parameters)


timer = Timer("gradients()", globals=globals())
plain, times = gradients(), {"plain PyTorch": 1000 * timer.blocked_autorange().median}
for precision in ("fp32", "bf16"):
    looped_fast.accelerate(model, precision=precision)
    differences = [(a - b).norm() / b.norm() for a, b in zip(gradients(), plain, strict=True)]
    print(f"{precision}: gradients differ by at most {max(differences):.0e} of their size")
    times[f"accelerate, {precision}"] = 1000 * timer.blocked_autorange().median
looped_fast.restore(model)  # as it was

# %%
figure, axes = plt.subplots(figsize=(6, 1.8), layout="constrained")
axes.bar_label(axes.barh(list(times), list(times.values()), color="#c04f00"), fmt=" %.0f ms")
axes.invert_yaxis()
axes.set(xlabel="training step, ms (16 prompts, 12 loops)", xlim=(0, 1.2 * max(times.values())))
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(os.environ.get("PICTURES", ".")) / "examples-drop-in.png", dpi=150)
