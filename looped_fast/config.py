"""Model settings: one small frozen record, checked when it is made.

Names are those of the official code (``scripts/schema.py``), which are nanoGPT's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from looped_fast.errors import check_name

VERSION = "0.1.0"  # as in pyproject.toml; a test compares them
INJECTIONS = ("add", "mul", "none", "every_block")
PRECISIONS = ("fp32", "bf16", "fp16")  # operands of matrix products
BACKENDS = ("triton", "cpu", "compiled", "reference")  # preferred first, if none is measured
ATTENTION = ("triton", "flash_attn", "sdpa")  # implementations on the triton backend
PRED_TYPES = ("regression", "classification")
N_CLASSES = 2  # official scripts/models.py: MAX_NUM_CLASS
LAYER_NORM_EPS = 1e-5
DEFAULT_WINDOW = 15


@dataclass(frozen=True)
class ModelConfig:
    """Shape and recurrence of a looped, standard or weight-tied transformer.

    Attributes:
        n_dims: width d of one prompt token.
        n_positions: most in-context points n; a prompt has up to ``2 * n_positions`` tokens.
        n_embd: residual width D.
        n_layer: transformer blocks inside one loop step (L).
        n_head: attention heads; must divide ``n_embd``.
        n_loops: loop steps b, unless a call says otherwise.
        window: last steps T that carry gradient and predict, unless a call says otherwise; by
            default 15, the paper's, or ``n_loops`` where that is less.
        injection: how the embedded prompt e enters a step that starts from state z:
            ``add`` z + e with z = 0 at first (paper section 4; official ``z=f(x+z)``),
            ``mul`` z * e with z = 1 at first (official ``z=f(x*z)``),
            ``none`` z alone, z = e at first (standard and weight-tied models),
            ``every_block`` as ``none``, and e is added before each block
            (official ``add_inputs_embeds``).
        pred_type: ``regression`` (one output) or ``classification`` (two logits).
        init_std: standard deviation of initial weights. GPT-2's 0.02 suits a wide model; a narrow
            one starts nearly linear with it, and learns faster from about 1 / sqrt(n_embd).

    Raises:
        ValueError: a setting out of range; the message names value, limit and remedy.
    """

    n_dims: int = 20
    n_positions: int = 101
    n_embd: int = 256
    n_layer: int = 1
    n_head: int = 8
    n_loops: int = 30
    window: int = None  # type: ignore[assignment]  # __post_init__ puts a number
    injection: str = "add"
    pred_type: str = "regression"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.window is None and isinstance(self.n_loops, int):
            object.__setattr__(self, "window", min(DEFAULT_WINDOW, max(1, self.n_loops)))
        for name in ("n_dims", "n_positions", "n_embd", "n_layer", "n_head", "n_loops", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}: a whole number of at least 1 is needed")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}; "
                f"choose n_embd as a multiple of {self.n_head}, or another n_head"
            )
        check_window(self.n_loops, self.window)
        if not isinstance(self.init_std, int | float) or not self.init_std > 0:
            raise ValueError(f"init_std = {self.init_std!r}: a number above 0 is needed")
        check_name("injection", self.injection, INJECTIONS)
        check_name("pred_type", self.pred_type, PRED_TYPES)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def n_outputs(self) -> int:
        """Width of the read-out."""
        return N_CLASSES if self.pred_type == "classification" else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``; the error for an unknown key suggests the nearest."""
        valid = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            check_name("model setting", name, valid)
        return cls(**settings)


def check_window(n_loops: int, window: int, at_least: int = 1) -> None:
    """Raise ValueError unless ``1 <= n_loops`` and ``at_least <= window <= n_loops``.

    Raises TypeError if one of them is no whole number; symbolic ones of torch.compile are.
    """
    check_whole("n_loops", n_loops)
    check_whole("window", window)
    if n_loops < 1:
        raise ValueError(f"n_loops = {n_loops}: at least 1 loop step is needed")
    if not at_least <= window <= n_loops:
        raise ValueError(
            f"window = {window} is outside {at_least}..{n_loops} (n_loops); lower window or raise "
            f"n_loops"
        )


def check_whole(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a whole number: an int, a NumPy or a symbolic one."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} = {value!r}: a whole number is needed")
