"""What is measured (cases) and who takes part (contenders), as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from looped_fast import ModelConfig, TRMConfig
from looped_fast.ops.flops import loop_flops


@dataclass(frozen=True)
class Case:
    """One looped model and the size of its batch."""

    batch: int  # B
    n_points: int  # n; S = 2n tokens
    n_loops: int  # b
    window: int  # T, in training; inference only returns the last prediction
    n_dims: int = 20  # d
    n_embd: int = 256  # D
    n_head: int = 8
    modes: tuple[str, ...] = ("training", "inference")

    def config(self) -> ModelConfig:
        """The model of this case."""
        return ModelConfig(
            n_dims=self.n_dims,
            n_embd=self.n_embd,
            n_head=self.n_head,
            n_loops=self.n_loops,
            window=self.window,
        )

    def describe(self) -> str:
        """The sizes, as a table is headed."""
        return (
            f"B={self.batch} S={2 * self.n_points} D={self.n_embd} H={self.n_head} "
            f"b={self.n_loops} T={self.window}"
        )

    def shorter(self) -> Case:
        """The case with two loop steps."""
        return dataclasses.replace(self, n_loops=2, window=2)

    def flops(self, mode: str) -> float:
        """See ``flops``. In causal attention those of visible keys."""
        S, window = 2 * self.n_points, self.window if mode == "training" else 0
        return loop_flops(self.batch, S, self.n_embd, 1, self.n_loops, window, keys=(S + 1) / 2)


@dataclass(frozen=True)
class PuzzleCase:
    """One Tiny Recursive Model and the size of its batch, for a supervision step."""

    batch: int  # B
    seq_len: int  # S, tokens of a puzzle
    vocab_size: int
    hidden_size: int = 128  # D
    num_heads: int = 4
    H_cycles: int = 3
    L_cycles: int = 6
    puzzle_emb_len: int = 0  # tokens before the puzzle
    modes: tuple[str, ...] = ("training", "inference")

    def config(self) -> TRMConfig:
        """The model of this case."""
        return TRMConfig(
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            H_cycles=self.H_cycles,
            L_cycles=self.L_cycles,
            puzzle_emb_len=self.puzzle_emb_len,
            puzzle_emb_ndim=self.hidden_size if self.puzzle_emb_len else 0,
        )

    def describe(self) -> str:
        """The sizes, as a table is headed."""
        config = self.config()
        return (
            f"B={self.batch} S={config.n_tokens} D={self.hidden_size} heads={self.num_heads} "
            f"hidden={config.mlp_hidden} L_layers={config.L_layers} H_cycles={self.H_cycles} "
            f"L_cycles={self.L_cycles}"
        )

    @property
    def n_points(self) -> int:
        """The length that ``explain_backend`` takes: S."""
        return self.seq_len

    def shorter(self) -> PuzzleCase:
        """The case with one cycle of two updates."""
        return dataclasses.replace(self, H_cycles=1, L_cycles=1)

    def flops(self, mode: str) -> float:
        """See ``flops``. Only the last cycle has a backward."""
        config, cycle = self.config(), self.L_cycles + 1
        return loop_flops(
            self.batch,
            config.n_tokens,
            self.hidden_size,
            config.L_layers,
            self.H_cycles * cycle,
            cycle if mode == "training" else 0,
            block=config.block,
        )


# LR and DT: arXiv 2311.12424, appendix; official configs/linear_regression, decision_tree.
CASES = {
    "lr": Case(batch=64, n_points=41, n_loops=20, window=15),
    "dt": Case(batch=64, n_points=101, n_loops=70, window=15),
    "small": Case(
        batch=64, n_points=21, n_loops=12, window=10, n_dims=10, n_embd=128, n_head=4
    ),
    "lr_b1": Case(batch=1, n_points=41, n_loops=20, window=15, modes=("inference",)),
    "dt_b1": Case(batch=1, n_points=101, n_loops=70, window=15, modes=("inference",)),
}  # fmt: skip

# Sudoku of 4x4 and 6x6 cells, and the public configuration for 9x9 (config/arch/trm.yaml).
PUZZLES = {
    "sudoku4": PuzzleCase(batch=64, seq_len=16, vocab_size=6),
    "sudoku6": PuzzleCase(batch=64, seq_len=36, vocab_size=8),
    "sudoku4_b1": PuzzleCase(batch=1, seq_len=16, vocab_size=6),
    "sudoku6_b1": PuzzleCase(batch=1, seq_len=36, vocab_size=8),
    "sudoku9": PuzzleCase(
        batch=8, seq_len=81, vocab_size=11, hidden_size=512, num_heads=8, puzzle_emb_len=16
    ),
}
ALL_CASES: dict[str, Case | PuzzleCase] = {**CASES, **PUZZLES}


@dataclass(frozen=True)
class Contender:
    """One way to run the loop."""

    backend: str  # of LoopedTransformer
    precision: str  # fp32, or bf16 by autocast
    whole_model: bool = False  # torch.compile gets the model; backend "compiled": one loop step
    compile_mode: str | None = None  # of torch.compile, for the whole model
    attention: str = "auto"  # of LoopedTransformer
    recompute: bool = False  # of LoopedTransformer
    fused_loss: bool = False  # trains with LoopedTransformer.loss, else with a loss of predictions
    graphs: bool = False  # replays training steps and calls as CUDA graphs
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = ("training", "inference")

    @property
    def is_engine(self) -> bool:
        """True for the project's own backends; the others are opponents."""
        return self.backend not in ("reference", "compiled")

    @property
    def compiles(self) -> bool:
        """True if torch.compile is used."""
        return self.whole_model or self.backend == "compiled"


# Opponents are plain PyTorch. A compiled step takes the same time to compile for any number of
# loops; a compiled model takes minutes for many, but may fuse across steps, and is what
# reduce-overhead can make one CUDA graph of. A time limit cuts off the end of this list: bf16, in
# which people train, comes before fp32, and what takes minutes to compile comes last.
_ON_CPU = {"devices": ("cpu",)}
_TRAINING_ON_CPU = {"devices": ("cpu",), "modes": ("training",)}
_ON_GPU = {"devices": ("cuda",)}
_TRITON = {"backend": "triton", "fused_loss": True, **_ON_GPU}
CONTENDERS = {
    "engine bf16": Contender("cpu", "bf16", fused_loss=True, **_ON_CPU),
    "engine bf16 autograd": Contender("cpu", "bf16", **_TRAINING_ON_CPU),
    "engine bf16 recompute": Contender("cpu", "bf16", recompute=True, **_TRAINING_ON_CPU),
    "triton bf16 graphs": Contender(precision="bf16", graphs=True, **_TRITON),
    "triton bf16": Contender(precision="bf16", **_TRITON),
    "eager bf16": Contender("reference", "bf16"),
    "eager bf16 graphs": Contender("reference", "bf16", graphs=True, **_ON_GPU),
    "compiled step bf16": Contender("compiled", "bf16"),
    "compiled step bf16 graphs": Contender("compiled", "bf16", graphs=True, **_ON_GPU),
    **{
        f"triton bf16 graphs {name}": Contender(
            precision="bf16", attention=name, graphs=True, **_TRITON
        )
        for name in ("triton", "sdpa", "flash_attn")
    },
    "reduce-overhead bf16": Contender(
        "reference", "bf16", whole_model=True, compile_mode="reduce-overhead", **_ON_GPU
    ),
    "engine fp32": Contender("cpu", "fp32", fused_loss=True, **_ON_CPU),
    "engine fp32 autograd": Contender("cpu", "fp32", **_TRAINING_ON_CPU),
    "engine fp32 recompute": Contender("cpu", "fp32", recompute=True, **_TRAINING_ON_CPU),
    "triton fp32 graphs": Contender(precision="fp32", graphs=True, **_TRITON),
    "triton fp32": Contender(precision="fp32", **_TRITON),
    "eager fp32": Contender("reference", "fp32"),
    "compiled step fp32": Contender("compiled", "fp32"),
    "compiled model bf16": Contender("reference", "bf16", whole_model=True),
    "compiled model fp32": Contender("reference", "fp32", whole_model=True),
}


def modes(case: Case | PuzzleCase, contender: Contender) -> list[str]:
    """Modes in which a contender is measured on a case.

    A Tiny Recursive Model has one loss, with which the engine trains.
    """
    of_another_loss = contender.backend == "cpu" and not contender.fused_loss
    if isinstance(case, PuzzleCase) and of_another_loss and not contender.recompute:
        return []
    return [mode for mode in case.modes if mode in contender.modes]


def flops(case: Case | PuzzleCase, mode: str) -> float:
    """Floating-point operations of the matrix products in the loop of one training step or call.

    See ``loop_flops``. What is around the loop (under 0.1 %) and element-wise work are left out.
    """
    return case.flops(mode)
