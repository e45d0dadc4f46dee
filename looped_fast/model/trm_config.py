"""Settings of a Tiny Recursive Model: one frozen record, under the public code's names."""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any

from looped_fast.errors import check_name
from looped_fast.ops.block import TRM, Block

POS_ENCODINGS = ("rope", "learned", "none")
_COUNTS = (
    "vocab_size", "seq_len", "hidden_size", "num_heads", "L_layers", "H_cycles", "L_cycles",
    "halt_max_steps", "num_puzzle_identifiers",
)  # fmt: skip
_HIDDEN_MULTIPLE = 256  # of the MLP's hidden width


@dataclass(frozen=True)
class TRMConfig:
    """Shape and schedule of a Tiny Recursive Model (arXiv 2510.04871).

    Attributes:
        vocab_size: V, tokens 0 .. V - 1 in inputs and answers.
        seq_len: S, tokens of a puzzle; 81 for a 9x9 Sudoku.
        hidden_size: residual width D.
        num_heads: attention heads; must divide ``hidden_size``.
        L_layers: blocks of the one network, which updates both states.
        H_cycles: cycles of a supervision step (T in the paper); the last one carries gradient.
        L_cycles: updates of z_L in a cycle (n in the paper), after which z_H is updated once.
        expansion: hidden width of the MLP over D, before the factor 2/3 of a gated one.
        pos_encodings: ``rope``, ``learned`` (added to the embedded tokens), or ``none``.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies.
        halt_max_steps: most supervision steps for a puzzle.
        halt_exploration_prob: how often a training puzzle may not halt early.
        puzzle_emb_ndim: width of an embedding that each puzzle identifier has; 0 for none.
        puzzle_emb_len: tokens before the puzzle that hold its embedding; 0 for as many as it needs.
        num_puzzle_identifiers: puzzle identifiers 0 .. num_puzzle_identifiers - 1.
        mlp_t: the public code's MLP across tokens instead of attention; only False is supported.

    Raises:
        ValueError: a setting out of range; the message names value, limit and remedy.

    Source: public ``models/recursive_reasoning/trm.py``, whose names these are.
    """

    vocab_size: int
    seq_len: int
    hidden_size: int = 512
    num_heads: int = 8
    L_layers: int = 2
    H_cycles: int = 3
    L_cycles: int = 6
    expansion: float = 4.0
    pos_encodings: str = "rope"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    halt_max_steps: int = 16
    halt_exploration_prob: float = 0.1
    puzzle_emb_ndim: int = 0
    puzzle_emb_len: int = 0
    num_puzzle_identifiers: int = 1
    mlp_t: InitVar[bool] = False

    def __post_init__(self, mlp_t: bool) -> None:
        if mlp_t:
            raise ValueError(
                f"mlp_t = {mlp_t!r}: an MLP across tokens is not supported; set mlp_t=False for "
                f"attention, or run the public code"
            )
        for name in _COUNTS:
            _check_count(name, getattr(self, name), at_least=1)
        for name in ("puzzle_emb_ndim", "puzzle_emb_len"):
            _check_count(name, getattr(self, name), at_least=0)
        for name in ("expansion", "rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} = {value!r}: a number above 0 is needed")
        probability = self.halt_exploration_prob
        if not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise ValueError(f"halt_exploration_prob = {probability!r} is outside 0..1")
        check_name("pos_encodings", self.pos_encodings, POS_ENCODINGS)
        self._check_widths()

    def _check_widths(self) -> None:
        D, n_heads, P = self.hidden_size, self.num_heads, self.puzzle_emb_len
        if D % n_heads:
            raise ValueError(
                f"hidden_size = {D} is not divisible by num_heads = {n_heads}; choose hidden_size "
                f"as a multiple of {n_heads}, or another num_heads"
            )
        if self.pos_encodings == "rope" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads = {self.head_dim} is odd, and rotary positions turn "
                f"pairs; choose another num_heads, or pos_encodings='learned' or 'none'"
            )
        if P and not self.puzzle_emb_ndim:
            raise ValueError(
                f"puzzle_emb_len = {P}, but puzzle_emb_ndim = 0: nothing would fill those tokens; "
                f"set puzzle_emb_len=0, or puzzle_emb_ndim up to {P * D}"
            )
        if P and self.puzzle_emb_ndim > P * D:
            raise ValueError(
                f"puzzle_emb_len = {P} tokens of {D} can't hold puzzle_emb_ndim = "
                f"{self.puzzle_emb_ndim} values; set puzzle_emb_len=0 for as many as it needs"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden width F of the MLP: 2/3 of the expansion, rounded up to a multiple of 256."""
        width = round(self.expansion * self.hidden_size * 2 / 3)
        return -(width // -_HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE

    @property
    def n_puzzle_tokens(self) -> int:
        """Tokens before the puzzle that hold its embedding."""
        return self.puzzle_emb_len or -(self.puzzle_emb_ndim // -self.hidden_size)

    @property
    def n_tokens(self) -> int:
        """Tokens of a state: those of the puzzle's embedding, then S."""
        return self.n_puzzle_tokens + self.seq_len

    @cached_property
    def block(self) -> Block:
        """Settings of the blocks for ``ops.loop``."""
        positions = "rotary" if self.pos_encodings == "rope" else "none"
        return TRM._replace(
            norm_eps=self.rms_norm_eps, mlp_hidden=self.mlp_hidden, positions=positions
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TRMConfig:
        """The inverse of ``to_dict``; the error for an unknown key suggests the nearest."""
        valid = [*(f.name for f in dataclasses.fields(cls)), "mlp_t"]
        for name in settings:
            check_name("TRM setting", name, valid)
        return cls(**settings)


def _check_count(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} = {value!r}: a whole number of at least {at_least} is needed")
