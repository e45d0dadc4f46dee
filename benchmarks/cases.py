"""What is measured (cases) and who takes part (contenders), as data."""

from __future__ import annotations

from dataclasses import dataclass

from looped_fast import ModelConfig
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


def modes(case: Case, contender: Contender) -> list[str]:
    """Modes in which a contender is measured on a case."""
    return [mode for mode in case.modes if mode in contender.modes]


def flops(case: Case, mode: str) -> float:
    """Floating-point operations of the matrix products in the loop of one training step or call.

    In causal attention those of visible keys; see ``loop_flops``. Read-in and read-out (under
    0.1 %) and element-wise work are left out.
    """
    S, window = 2 * case.n_points, case.window if mode == "training" else 0
    return loop_flops(case.batch, S, case.n_embd, 1, case.n_loops, window, keys=(S + 1) / 2)
