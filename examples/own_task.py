# %% [markdown]
# # Your own function class
# A task is a frozen dataclass: `draw` makes random functions, `evaluate` computes them, fields are
# options. In a file `waves.py`, it trains by `looped-fast train --task waves:Waves`.

# %%
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from looped_fast.evaluation import evaluation_batches, model_predictor, position_errors
from looped_fast.evaluation.baselines import least_squares, nearest_neighbours, on_features
from looped_fast.tasks import Task, randn
from looped_fast.training.config import TrainConfig
from looped_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Waves(Task):  # y = a·sin(f x) + b·cos(f x), with a, b ~ N(0, I)
    frequency: float = 1.0

    def draw(self, n_prompts, n_points, generator):
        return {"w": randn(n_prompts, 2 * self.n_dims, 1, generator=generator)}

    def evaluate(self, xs, w):  # [B, n, d] -> [B, n]
        return (self.features(xs) @ w)[..., 0]

    def features(self, xs):
        return torch.cat(((self.frequency * xs).sin(), (self.frequency * xs).cos()), -1)


# %%
config = TrainConfig(
    task=Waves, n_dims=1, n_points=11, n_positions=11, n_embd=32, n_head=4, n_loops=4, steps=600,
    lr=6e-3, beta2=0.98, init_std=0.2, warmup_steps=50, lr_decay="cosine", clip_grad_norm=1.0,
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(config, Path(folder))
    trainer.fit()

# %%
task = trainer.task
methods = {
    "looped transformer": model_predictor(trainer.model, 4),
    "3-nearest neighbours": nearest_neighbours,
    "least squares on sin, cos": on_features(task.features, least_squares),
}
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.set_prop_cycle(color=["#c04f00", "#0a4a86", "#676d75"])
for name, predict in methods.items():
    errors = position_errors(predict, task, evaluation_batches(task, 512, 11, seed=0, device="cpu"))
    axes.plot(errors, label=name)
    print(f"{name}: error {errors[-1]:.4f} after 10 examples")
axes.set(xlabel="examples", ylabel="squared error / variance", ylim=0)
axes.legend(frameon=False)
figure.savefig(Path(os.environ.get("PICTURES", ".")) / "examples-own-task.png", dpi=120)
