"""Function classes: prompts of (x, f(x)) with a fresh f for each prompt.

The first five are the paper's, with the distributions of the official ``scripts/tasks.py``; two are
of Garg et al. (arXiv 2208.01066; dtsip/in-context-learning, ``src/tasks.py``). In both, trees and
sparse weights are drawn and evaluated in Python loops over the batch; nothing here loops over
prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from looped_fast.tasks.base import Task, randn
from looped_fast.tasks.registry import register


@register("lr")
@dataclass(frozen=True)
class LinearRegression(Task):
    """y = w·x, w ~ N(0, I_d)."""

    @property
    def variance(self) -> float:
        """E[y^2] = d."""
        return self.n_dims

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """w: [B, d, 1]."""
        return {"w": randn(n_prompts, self.n_dims, 1, generator=generator)}

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """x·w."""
        return (xs @ function["w"]).sum(-1)


@register("noisy_lr")
@dataclass(frozen=True)
class NoisyLinearRegression(LinearRegression):
    """y = w·x + noise, noise ~ N(0, noise_std^2).

    Attributes:
        noise_std: standard deviation of the noise.
    """

    noise_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_std >= 0:
            raise ValueError(f"noise_std = {self.noise_std}: at least 0 is needed")

    @property
    def variance(self) -> float:
        """E[y^2] = d + noise_std^2."""
        return self.n_dims + self.noise_variance

    @property
    def noise_variance(self) -> float:
        """noise_std^2."""
        return self.noise_std**2

    @property
    def known_baselines(self) -> tuple[str, ...]:
        """With noise also ridge regression, which is then the best predictor."""
        return (*super().known_baselines, *(("ridge",) if self.noise_std > 0 else ()))

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """w: [B, d, 1]; noise: [B, n]."""
        function = super().draw(n_prompts, n_points, generator)
        noise = randn(n_prompts, n_points, generator=generator)
        return {**function, "noise": noise * self.noise_std}

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """x·w + noise."""
        return LinearRegression.evaluate(xs, w=function["w"]) + function["noise"][:, : xs.shape[1]]


@register("sparse_lr")
@dataclass(frozen=True)
class SparseLinearRegression(LinearRegression):
    """y = w·x, w ~ N(0, I_d) on ``sparsity`` coordinates chosen at random, 0 elsewhere.

    Attributes:
        sparsity: number of weights that are not zero.
    """

    sparsity: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("sparsity")
        if self.sparsity > self.n_dims:
            raise ValueError(
                f"sparsity = {self.sparsity} exceeds n_dims = {self.n_dims}; lower sparsity"
            )

    @property
    def variance(self) -> float:
        """E[y^2] = sparsity."""
        return self.sparsity

    @property
    def known_baselines(self) -> tuple[str, ...]:
        """The lasso, too."""
        return (*super().known_baselines, "lasso")

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """w: [B, d, 1]."""
        w = super().draw(n_prompts, n_points, generator)["w"]
        order = torch.rand(w.shape, generator=generator, device=generator.device)
        kept = order.topk(self.sparsity, dim=1).indices  # [B, s, 1]
        return {"w": torch.zeros_like(w).scatter(1, kept, w.gather(1, kept))}


@register("relu_2nn")
@dataclass(frozen=True)
class Relu2LayerNetwork(Task):
    """y = sqrt(2 / h) W2·relu(W1·x), all weights ~ N(0, 1), h = ``hidden``.

    Attributes:
        hidden: hidden units.
    """

    hidden: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("hidden")

    @property
    def known_baselines(self) -> tuple[str, ...]:
        """A network, too."""
        return ("least squares", "3-nearest neighbours", "2-layer network")

    @property
    def variance(self) -> float:
        """E[y^2] = (2 / h) * h * d / 2 = d."""
        return self.n_dims

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """W1: [B, d, h]; W2: [B, h, 1]."""
        return {
            "W1": randn(n_prompts, self.n_dims, self.hidden, generator=generator),
            "W2": randn(n_prompts, self.hidden, 1, generator=generator),
        }

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """sqrt(2 / h) W2·relu(W1·x)."""
        hidden = torch.relu(xs @ function["W1"])  # [B, n, h]
        return (hidden @ function["W2"])[:, :, 0] * math.sqrt(2 / hidden.shape[-1])


@register("dt")
@dataclass(frozen=True)
class DecisionTree(Task):
    """A complete binary tree: each inner node asks whether one coordinate is positive.

    Inner nodes and leaves are numbered level by level; a positive coordinate goes right. Leaf
    values ~ N(0, 1), coordinates uniform. As in the official code the curriculum does not
    truncate x here.

    Attributes:
        depth: of the tree, which has 2^depth leaves.
    """

    depth: int = 4
    truncates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("depth")

    @property
    def known_baselines(self) -> tuple[str, ...]:
        """Trees, on x and on its signs."""
        trees = ("greedy tree", "greedy tree, signs", "XGBoost", "XGBoost, signs")
        return ("3-nearest neighbours", *trees)

    @property
    def variance(self) -> float:
        """E[y^2] = 1."""
        return 1.0

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """coordinates: [B, 2^depth - 1] int64, of inner nodes; leaf_values: [B, 2^depth]."""
        shape = (n_prompts, 2**self.depth - 1)
        device = generator.device
        return {
            "coordinates": torch.randint(self.n_dims, shape, generator=generator, device=device),
            "leaf_values": randn(n_prompts, 2**self.depth, generator=generator),
        }

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """The value of the leaf that each x reaches.

        Raises:
            ValueError: the numbers of leaves and inner nodes are not those of a complete tree.
        """
        coordinates, leaf_values = function["coordinates"], function["leaf_values"]
        n_leaves, n_inner = leaf_values.shape[1], coordinates.shape[1]
        depth = n_leaves.bit_length() - 1
        if depth < 1 or n_leaves != 2**depth or n_inner != n_leaves - 1:
            raise ValueError(
                f"leaf_values of width {n_leaves} and coordinates of width {n_inner} do not make a "
                "complete binary tree; give 2^depth leaf values (2, 4, 8, ...) and one coordinate "
                "fewer"
            )
        root = coordinates[:, :1].expand(-1, xs.shape[1])  # [B, n]
        node = (xs.gather(2, root.unsqueeze(-1)).squeeze(-1) > 0).long()  # index within its level
        for level in range(1, depth):
            coordinate = coordinates[:, 2**level - 1 :].gather(1, node)
            is_positive = xs.gather(2, coordinate.unsqueeze(-1)).squeeze(-1) > 0
            node = torch.add(is_positive, node, alpha=2)
        return leaf_values.gather(1, node)


@register("quadratic")
@dataclass(frozen=True)
class QuadraticRegression(LinearRegression):
    """y = w·x^2 / sqrt(3), w ~ N(0, I_d), x^2 coordinate by coordinate (Garg et al.).

    The factor gives it the variance of linear regression, d.
    """

    @property
    def known_baselines(self) -> tuple[str, ...]:
        """Least squares on squares, too: the best predictor."""
        return (*super().known_baselines, "least squares, squares")

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """x^2·w / sqrt(3)."""
        return LinearRegression.evaluate(xs.square(), w=function["w"]) / math.sqrt(3)


@register("classification")
@dataclass(frozen=True)
class LinearClassification(LinearRegression):
    """y = sign(w·x), which is 1 or -1, w ~ N(0, I_d) (Garg et al.).

    Training and errors are as for every other task: the squared error of one output. Its minimum
    is E[y | prompt], whose sign is the most probable class. Garg et al. train with the cross
    entropy of sigmoid(output), and report how often the sign is right.
    """

    @property
    def variance(self) -> float:
        """E[y^2] = 1."""
        return 1.0

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """sign(x·w)."""
        return LinearRegression.evaluate(xs, w=function["w"]).sign()


@register("fourier")
@dataclass(frozen=True)
class FourierSeries(Task):
    """A random Fourier series in each coordinate, in the manner of arXiv 2306.04891.

    y = sum over coordinates j and k = 0 .. K of a_jk cos(2 pi k x_j / period)
    + b_jk sin(2 pi k x_j / period), over sqrt(K + 1), with a, b ~ N(0, 1) and K = ``frequencies``.
    The curriculum does not truncate x: the series of a coordinate does not vanish at 0.

    Attributes:
        frequencies: K, the highest frequency in units of 1 / period.
        period: of the series; most x ~ N(0, 1) are within one of the default length.
    """

    frequencies: int = 3
    period: float = 8.0
    truncates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("frequencies")
        if not 0 < self.period < math.inf:
            raise ValueError(f"period = {self.period}: a finite number above 0 is needed")

    @property
    def variance(self) -> float:
        """E[y^2] = d: cos^2 + sin^2 = 1 for each of d (K + 1) terms."""
        return self.n_dims

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """cosines, sines: [B, d (K + 1), 1]."""
        shape = (n_prompts, self.n_dims * (self.frequencies + 1), 1)
        return {name: randn(*shape, generator=generator) for name in ("cosines", "sines")}

    def evaluate(self, xs: Tensor, **function: Tensor) -> Tensor:
        """The series at xs."""
        k = torch.arange(self.frequencies + 1, device=xs.device)
        angles = (xs[..., None] * (2 * math.pi / self.period * k)).flatten(2)  # [B, n, d (K + 1)]
        ys = angles.cos() @ function["cosines"] + angles.sin() @ function["sines"]
        return ys[:, :, 0] / math.sqrt(self.frequencies + 1)


# Names in the official configurations (``training.task_name``).
OFFICIAL_TASK_NAMES = {
    "linear_regression": "lr",
    "noisy_linear_regression": "noisy_lr",
    "sparse_linear_regression": "sparse_lr",
    "decision_tree": "dt",
    "relu_2nn_regression": "relu_2nn",
}
