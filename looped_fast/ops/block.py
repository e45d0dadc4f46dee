"""What differs between the blocks of looped transformers, as one small record.

GPT-2's block, the paper's, is one value of it, ``GPT2``; that of the Tiny Recursive Model
(arXiv 2510.04871) another, ``TRM``. ``reference.py`` computes every value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from looped_fast.config import LAYER_NORM_EPS
from looped_fast.errors import check_name

NORMS = ("layer_norm", "rms_norm")
NORM_PLACES = ("before", "after", "both")
MLPS = ("gelu", "swiglu")
MASKS = ("causal", "full")
POSITIONS = ("learned", "rotary", "none")


class Block(NamedTuple):
    """Settings of the blocks of a loop; the ops take them one by one, in this order.

    Attributes:
        norm: ``layer_norm``, or ``rms_norm``, which does not subtract the mean.
        norm_weight: norms scale by a weight [D].
        norm_bias: norms add a bias [D].
        norm_eps: added to the variance, or to the mean square.
        norm_place: where a sublayer f has its norm: ``before``, x + f(norm(x)) (GPT-2); ``after``,
            norm(x + f(x)) (TRM); ``both``, norm(x + f(norm(x))) with two norms (the sandwich of
            arXiv 2502.05171, section 3.2).
        mlp: ``gelu``, Wproj gelu(Wfc x) in the tanh form; ``swiglu``, Wproj (silu(g) u), where g
            and u are the two halves of Wfc x.
        mlp_hidden: hidden width F of the MLP; None for 4 D.
        mask: what a token attends to: ``causal``, itself and tokens before it; ``full``, all.
        positions: ``learned``, added at the start of each step; ``rotary``, queries and keys are
            rotated by tables; ``none``.
        bias: Linears have biases.
        final_norm: each step ends with a norm of its own.
    """

    norm: str = "layer_norm"
    norm_weight: bool = True
    norm_bias: bool = True
    norm_eps: float = LAYER_NORM_EPS
    norm_place: str = "before"
    mlp: str = "gelu"
    mlp_hidden: int | None = None
    mask: str = "causal"
    positions: str = "learned"
    bias: bool = True
    final_norm: bool = True

    def check(self) -> None:
        """Raise ValueError for a setting that is unknown or out of range, by its name."""
        check_name("norm", self.norm, NORMS)
        check_name("norm_place", self.norm_place, NORM_PLACES)
        check_name("mlp", self.mlp, MLPS)
        check_name("mask", self.mask, MASKS)
        check_name("positions", self.positions, POSITIONS)
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps = {self.norm_eps!r}: a number above 0 is needed")
        if self.mlp_hidden is not None and self.mlp_hidden < 1:
            raise ValueError(
                f"mlp_hidden = {self.mlp_hidden}: a width of at least 1, or None for 4 D, is needed"
            )

    def hidden(self, n_embd: int) -> int:
        """Hidden width F of the MLP, at a width D."""
        return 4 * n_embd if self.mlp_hidden is None else self.mlp_hidden

    def fc_width(self, n_embd: int) -> int:
        """Outputs of the MLP's first Linear: F, or 2 F with a gate."""
        return self.hidden(n_embd) * (2 if self.mlp == "swiglu" else 1)

    @property
    def n_block_weights(self) -> int:
        """Number of ``block_names``."""
        n_norms = 4 if self.norm_place == "both" else 2
        return n_norms * (self.norm_weight + self.norm_bias) + 4 * (1 + self.bias)

    @property
    def n_final_weights(self) -> int:
        """Number of ``final_names``."""
        return self.final_norm * (self.norm_weight + self.norm_bias)

    def n_layer(self, n_weights: int) -> int:
        """Blocks that a list of weights is for, with or without a read-out's two."""
        return (n_weights - self.n_final_weights) // self.n_block_weights

    def has_read_out(self, n_weights: int) -> bool:
        """True if a list of weights ends with a read-out's two."""
        return (n_weights - self.n_final_weights) % self.n_block_weights == 2


GPT2 = Block()
TRM = Block(
    norm="rms_norm", norm_weight=False, norm_bias=False, norm_place="after", mlp="swiglu",
    mask="full", positions="rotary", bias=False, final_norm=False,
)  # fmt: skip
KINDS = {"gpt2": GPT2, "trm": TRM}  # that fast backends have kernels for


def block_names(block: Block) -> tuple[str, ...]:
    """Names of the weights of one block that has such settings, in the order of the loop op."""
    before, after = block.norm_place != "after", block.norm_place != "before"
    return (
        *_norm_names("ln_1", block if before else None),
        *_linear_names(block, "c_attn", "attn_c_proj"),
        *_norm_names("ln_1_after", block if after else None),
        *_norm_names("ln_2", block if before else None),
        *_linear_names(block, "c_fc", "mlp_c_proj"),
        *_norm_names("ln_2_after", block if after else None),
    )


def final_names(block: Block) -> tuple[str, ...]:
    """Names of the weights of the final norm of a step."""
    return _norm_names("ln_f", block if block.final_norm else None)


def _norm_names(name: str, block: Block | None) -> tuple[str, ...]:
    if block is None:
        return ()
    parts = (block.norm_weight, "weight"), (block.norm_bias, "bias")
    return tuple(f"{name}_{part}" for has, part in parts if has)


def _linear_names(block: Block, *names: str) -> tuple[str, ...]:
    parts = ("weight", "bias") if block.bias else ("weight",)
    return tuple(f"{name}_{part}" for name in names for part in parts)


def shape_of(name: str, D: int, F: int, fc: int) -> tuple[int, ...]:
    """Shape of the weight of that name; F is ``Block.hidden``, fc ``Block.fc_width``."""
    shapes = {
        "c_attn_weight": (3 * D, D), "c_attn_bias": (3 * D,), "attn_c_proj_weight": (D, D),
        "c_fc_weight": (fc, D), "c_fc_bias": (fc,), "mlp_c_proj_weight": (D, F),
    }  # fmt: skip
    return shapes.get(name, (D,))  # norms, and biases of the projections


def unlike(block: Block, families: Iterable[Block], free: Iterable[str]) -> str | None:
    """Name the settings by which ``block`` differs from the nearest of ``families``; None if none.

    Settings in ``free`` may have any value.
    """
    fixed = [name for name in Block._fields if name not in free]

    def differing(family: Block) -> list[str]:
        return [name for name in fixed if getattr(block, name) != getattr(family, name)]

    names = min(map(differing, families), key=len)
    return ", ".join(f"{name} = {getattr(block, name)!r}" for name in names) or None
