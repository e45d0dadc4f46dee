"""The Tiny Recursive Model (arXiv 2510.04871): two states, and one small network for both.

Parameters and buffers carry the names of the public code
(SamsungSAILMontreal/TinyRecursiveModels, ``models/recursive_reasoning/trm.py``, ``_Inner``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from looped_fast.errors import check_name
from looped_fast.model import trm_checks
from looped_fast.model.blocks import Part
from looped_fast.model.on_backend import OnBackend, ambient_precision
from looped_fast.model.trm_blocks import (
    Embedding,
    Network,
    PuzzleEmbedding,
    RotaryEmbedding,
    linear,
    truncated_normal_,
)
from looped_fast.model.trm_config import TRMConfig
from looped_fast.model.trm_recursion import Net, deep_recursion, looped_net
from looped_fast.ops import reference
from looped_fast.ops.call import Call, LoopSettings

# Children that are called as modules, on any backend; the op stands in for ``L_level``.
CALLED = ("embed_tokens", "embed_pos", "puzzle_emb", "rotary_emb", "lm_head", "q_head")
_SQRT_HALF = 0.707106781  # the public code's digits
_Q_START = -5.0  # bias of q_head: nothing halts at first


class Carry(NamedTuple):
    """States between supervision steps."""

    z_H: Tensor  # [B, n_tokens, D], which holds the answer
    z_L: Tensor  # [B, n_tokens, D]


class TRMOutput(NamedTuple):
    """What a supervision step returns."""

    carry: Carry  # without gradient
    logits: Tensor  # [B, S, V]
    q_halt: Tensor  # [B] float32, logits of "the answer is right"
    q_continue: Tensor  # [B] float32


class Solution(NamedTuple):
    """Answers of ``TinyRecursiveModel.solve``."""

    tokens: Tensor  # [B, S]
    logits: Tensor  # [B, S, V]
    n_steps: Tensor  # [B] int64, supervision steps


Halt = Callable[[TRMOutput], Tensor]
HALT: dict[str, Halt] = {
    "never": lambda output: torch.zeros_like(output.q_halt, dtype=torch.bool),
    "q": lambda output: output.q_halt > 0,
}


class TinyRecursiveModel(OnBackend):
    """A puzzle solver that improves its answer step by step, with one small looped network.

        >>> config = TRMConfig(vocab_size=6, seq_len=16, hidden_size=64, num_heads=4)
        >>> model = TinyRecursiveModel(config)
        >>> puzzles = torch.randint(6, (3, 16))
        >>> output = model(puzzles)
        >>> output.logits.shape, output.q_halt.shape
        (torch.Size([3, 16, 6]), torch.Size([3]))
        >>> model(puzzles, output.carry).logits.shape  # the next supervision step
        torch.Size([3, 16, 6])
        >>> model.solve(puzzles, halt="q").tokens.shape
        torch.Size([3, 16])

    Args:
        config: shapes and schedule.
        backend: ``auto``, ``reference``, ``compiled``, ``cpu`` or ``triton``; see
            ``explain_backend``.
        recompute: save only states for the backward and recompute activations.
        attention: implementation on the triton backend; see ``ops.loop``.
        cuda_graphs: ``auto``, ``on`` or ``off``; see ``graphed_loop.GraphedLoop``.

    Raises:
        TypeError: ``config`` is no ``TRMConfig``, or ``recompute`` is no bool.
        ValueError: an unknown backend, attention or cuda_graphs.

    Hooks, adapters and replaced modules inside the model are in force: embeddings and heads are
    called as modules, and while any in ``L_level`` differs from what the op computes, the model
    runs module by module in plain PyTorch, and says so once.
    """

    H_init: Tensor
    L_init: Tensor

    def __init__(
        self,
        config: TRMConfig,
        backend: str = "auto",
        recompute: bool = False,
        attention: str = "auto",
        cuda_graphs: str = "auto",
    ) -> None:
        super().__init__(config, TRMConfig, backend, recompute, attention, cuda_graphs, CALLED)
        D = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, D)
        self.lm_head = linear(D, config.vocab_size)
        self.q_head = linear(D, 2, bias=True)
        if config.puzzle_emb_ndim:
            self.puzzle_emb = PuzzleEmbedding(config.num_puzzle_identifiers, config.puzzle_emb_ndim)
        if config.pos_encodings == "rope":
            self.rotary_emb = RotaryEmbedding(config)
        if config.pos_encodings == "learned":
            self.embed_pos = Embedding(config.n_tokens, D)
        self.L_level = Network(config)
        for name in ("H_init", "L_init"):
            self.register_buffer(name, truncated_normal_(torch.empty(D), 1))
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, _Q_START)

    def initial_carry(self, batch_size: int) -> Carry:
        """The states before the first supervision step, [batch_size, n_tokens, D].

        Raises:
            ValueError: ``batch_size`` is no whole number of at least 0.
        """
        trm_checks.check_batch_size(batch_size)
        shape = batch_size, self.config.n_tokens, self.config.hidden_size
        return Carry(*(z.expand(shape).contiguous() for z in (self.H_init, self.L_init)))

    def forward(
        self,
        inputs: Tensor,
        carry: Carry | None = None,
        puzzle_identifiers: Tensor | None = None,
    ) -> TRMOutput:
        """Run one supervision step: ``H_cycles`` cycles, of which the last carries gradient.

        Matrix products run in bf16 or fp16 under ``torch.autocast``, else in the parameters'
        dtype. States are float32 at any precision.

        Args:
            inputs: tokens of the puzzles, [B, S], of an integer dtype.
            carry: states of the step before; ``initial_carry`` by default.
            puzzle_identifiers: [B], of an integer dtype; needed if the model embeds them.

        Returns:
            Logits of the answer, [B, S, V], those of halting, [B], and states for the next step.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, or tokens or identifiers out of
                range. (Values are checked on CPUs only: on a GPU the check would stall the stream.)
            TypeError: an argument that is no tensor, or a carry that is no ``Carry``.

        Source: public ``TinyRecursiveReasoningModel_ACTV1_Inner.forward``.
        """
        config = self.config
        trm_checks.check_puzzles(config, inputs, puzzle_identifiers)
        x = self._embed(inputs, puzzle_identifiers)
        carry = self.initial_carry(len(inputs)) if carry is None else carry
        z_H, z_L = trm_checks.check_carry(carry, x)
        z_H, z_L = deep_recursion(self._net(x), x, z_H, z_L, config.L_cycles, config.H_cycles)
        # Keep the heads, a hundredth of the work, in full precision.
        with reference.autocast(x.device.type, "fp32"):
            logits = self.lm_head(z_H[:, config.n_puzzle_tokens :])
            q_halt, q_continue = self.q_head(z_H[:, 0]).float().unbind(-1)
        return TRMOutput(Carry(z_H.detach(), z_L.detach()), logits, q_halt, q_continue)

    @torch.no_grad()
    def solve(
        self,
        inputs: Tensor,
        *,
        halt: str | Halt = "never",
        max_steps: int | None = None,
        puzzle_identifiers: Tensor | None = None,
    ) -> Solution:
        """Run supervision steps until each puzzle halts, without gradient.

        A puzzle that halts keeps the answer of that step, and is computed no further.

        Args:
            inputs, puzzle_identifiers: as in ``forward``.
            halt: ``never``, to run every step; ``q``, where ``q_halt`` is above 0; or a function
                of the ``TRMOutput`` of the m puzzles that still run to [m] bool.
            max_steps: most supervision steps; ``config.halt_max_steps`` by default.

        Raises:
            ValueError: as in ``forward``; an unknown ``halt``, one that returns something else, or
                ``max_steps`` below 1.
            TypeError: as in ``forward``.
        """
        max_steps = self.config.halt_max_steps if max_steps is None else max_steps
        trm_checks.check_max_steps(max_steps)
        if isinstance(halt, str):
            check_name("halt", halt, HALT)
            halt = HALT[halt]
        output = self(inputs, None, puzzle_identifiers)
        logits = output.logits.clone()
        n_steps = torch.full((len(inputs),), max_steps, device=inputs.device)
        running = torch.arange(len(inputs), device=inputs.device)
        for step in range(1, max_steps):
            halted = trm_checks.check_halted(halt(output), output.q_halt)
            if halted.any():
                n_steps[running[halted]] = step
                on = ~halted
                running, inputs = running[on], inputs[on]
                carry = Carry(*(z[on] for z in output.carry))
                if puzzle_identifiers is not None:
                    puzzle_identifiers = puzzle_identifiers[on]
            else:
                carry = output.carry
            if not len(running):
                break
            output = self(inputs, carry, puzzle_identifiers)
            logits[running] = output.logits
        return Solution(logits.argmax(-1), logits, n_steps)

    def _embed(self, inputs: Tensor, puzzle_identifiers: Tensor | None) -> Tensor:
        """What each update of z_L adds: the embedded puzzle, [B, n_tokens, D]."""
        config, D = self.config, self.config.hidden_size
        x = self.embed_tokens(inputs)
        if config.puzzle_emb_ndim:
            puzzle = self.puzzle_emb(puzzle_identifiers)
            width = config.n_puzzle_tokens * D
            puzzle = nn.functional.pad(puzzle, (0, width - config.puzzle_emb_ndim))
            x = torch.cat((puzzle.view(-1, config.n_puzzle_tokens, D), x), dim=1)
        if config.pos_encodings == "learned":
            tokens = torch.arange(config.n_tokens, device=x.device)
            x = _SQRT_HALF * (x + self.embed_pos(tokens))
        return math.sqrt(D) * x

    def _net(self, x: Tensor) -> Net:
        """The network as the op runs it, or its modules where they differ from the op."""
        tables = self.rotary_emb() if self.config.pos_encodings == "rope" else None
        settings = self._settings(x.device.type)
        if not self.deviations():
            return looped_net(self.graphed, tables, self.L_level.op_weights(), settings)

        def run(injected: Tensor, state: Tensor, n_loops: int) -> Tensor:
            of_call = settings._replace(n_loops=n_loops, window=n_loops)
            return reference.iterate(self.L_level, state, (injected, tables), of_call)[-1]

        return run

    def _settings(self, device: str) -> LoopSettings:
        return LoopSettings(
            n_heads=self.config.num_heads,
            n_loops=self.config.L_cycles,
            window=1,
            precision=self.precision or ambient_precision(device),
            recompute=self.recompute,
            backend=self.backend,
            attention=self.attention,
            block=self.config.block,
        )

    def unfit(self) -> Iterable[str]:
        """Say of each module that the op stands in for why it would not compute the same."""
        unfit = tuple(filter(None, (part.unfit() for part in self._parts())))
        return unfit or self.L_level.unlike(self.config)

    def _parts(self) -> list[Part]:
        parts = [Part("L_level", self.L_level, Network)]
        if type(self.L_level) is Network:
            of_level = self.L_level.parts(self.config)
            parts += [part._replace(name=f"L_level.{part.name}") for part in of_level]
        return parts

    def describe_call(
        self,
        batch_size: int,
        n_points: int | None = None,
        precision: str | None = None,
        replayed_training: bool = False,
    ) -> Call:
        """Describe an update of z_L for the choice of a backend; see ``explain_backend``.

        Raises:
            ValueError: ``n_points`` is given, and is not the configuration's ``seq_len``.
        """
        config, weight = self.config, self.lm_head.weight
        trm_checks.check_n_points(n_points, config.seq_len)
        settings = self._settings(weight.device.type)
        if precision is not None:
            settings = settings._replace(precision=precision)
        sizes = batch_size, config.n_tokens, config.hidden_size, config.L_layers
        replayed = replayed_training or self.graphed.replays_on(weight.device)
        return Call(settings, weight.device, weight.dtype, *sizes, replayed, replayed_training)
