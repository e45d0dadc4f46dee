from dataclasses import dataclass

import torch

from looped_fast.evaluation.baselines import least_squares, on_features
from looped_fast.tasks import Task, randn


@dataclass(frozen=True)
class Polynomials(Task):
    degree: int = 3

    def features(self, xs):  # [B, n, d] -> [B, n, d * degree]
        return torch.cat([xs**k for k in range(1, self.degree + 1)], dim=-1)

    def draw(self, n_prompts, n_points, generator):
        return {"w": randn(n_prompts, self.n_dims * self.degree, 1, generator=generator)}

    def evaluate(self, xs, w):
        return (self.features(xs) @ w)[..., 0]

    def baselines(self):
        return {"polynomial fit": on_features(self.features, least_squares)}
