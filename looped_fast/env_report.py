"""Say which backend and precision run here, and why: ``python -m looped_fast.env_report``.

The first lines are for a user who has just installed the package; versions and hardware follow,
for a bug report.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch.utils.collect_env import get_pretty_env_info

from looped_fast.config import BACKENDS, PRECISIONS, VERSION, ModelConfig
from looped_fast.dropin import explain_backend
from looped_fast.errors import pip_install
from looped_fast.model import LoopedTransformer
from looped_fast.ops import cpu_engine
from looped_fast.ops.selection import Selection
from looped_fast.training.command_line import Parser, program
from looped_fast.training.distributed import resolve_device

_WHAT = {
    "triton": "this project's Triton kernels",
    "cpu": "the fused C++ engine",
    "compiled": "a loop step compiled by torch.compile",
    "reference": "plain PyTorch",
}
# Extra -> modules that it installs, and their use. Reasons against backends name other extras.
_EXTRAS = {
    "report": (("matplotlib", "tensorboard"), "plots, and TensorBoard's log"),
    "eval": (("sklearn", "pandas", "xgboost"), "the baselines of figures, and tabular sets"),
    "hub": (("huggingface_hub",), "models on the Hugging Face hub"),
    "wandb": (("wandb",), "training with --wandb"),
}


def main(args: list[str] | None = None) -> int:
    """Say which backend and precision run here, and why; then versions and hardware."""
    Parser(program("env_report"), description=main.__doc__).parse_args(args)
    print(report())
    return 0


def report() -> str:
    """The summary, then versions, hardware and the backend in each precision, as text."""
    device = resolve_device("auto")
    model = LoopedTransformer(ModelConfig()).to(device)
    selections = {
        precision: explain_backend(model, batch_size=64, n_points=41, precision=precision)
        for precision in PRECISIONS
    }
    details = [
        f"looped_fast {VERSION}, Python {platform.python_version()}",
        f"CPU instructions: {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
        f"CPU engine: {_engine()}",
        *(f"{precision} on {device}: {selected}" for precision, selected in selections.items()),
    ]
    blocks = [summary(device, selections), details, [get_pretty_env_info()]]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def summary(device: torch.device, selections: Mapping[str, Selection]) -> list[str]:
    """Lines that say which backend and precision are fastest here, why, and what is missing.

    selections: precision -> the backend that runs the paper's model in it on ``device``.
    """
    precision, why = _fastest_precision(device, selections)
    best, fp32 = selections[precision], selections["fp32"]
    faster = BACKENDS[: BACKENDS.index(best.chosen)]
    lines = [
        f"backend: {best.chosen}, {_WHAT[best.chosen]}, {_where(device, best)} "
        f"(the paper's model; looped_fast.explain_backend tells it of yours)",
        *(f"  not {name}: {best.reasons[name]}" for name in faster),
    ]
    if best.attention is not None:
        lines += str(best.attention).splitlines()
    if device.type == "cpu" and sys.platform != "darwin":  # macOS: no backend for its GPUs
        lines.append(_no_gpu())
    usage = f'train --amp {precision}; accelerate(model, precision="{precision}"); torch.autocast'
    how = "the default" if precision == "fp32" else usage
    lines.append(f"precision: {precision} ({how}) is fastest here: {why}")
    if fp32.chosen != best.chosen:
        reason = fp32.reasons[best.chosen]
        lines.append(f"  fp32 runs on {fp32.chosen}, not {best.chosen}: {reason}")
    return lines + _missing_extras()


def _where(device: torch.device, selection: Selection) -> str:
    if device.type == "cuda":
        return f"on {torch.cuda.get_device_name(device)}"
    n = torch.get_num_threads()
    return selection.limit or f"on {n} thread{'s' * (n > 1)} of this CPU"


def _no_gpu() -> str:
    """Say why the CPU is used, and what to do on a machine with a GPU."""
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm"
    remedy = "look at its driver (nvidia-smi or rocm-smi)"
    if torch.version.cuda is None and torch.version.hip is None:
        built_for = "CPUs alone"
        remedy = "install another build, from https://pytorch.org/get-started/locally"
    return (
        f"no GPU: PyTorch {torch.__version__}, built for {built_for}, sees none; if this machine "
        f"has one, {remedy}"
    )


def _fastest_precision(
    device: torch.device, selections: Mapping[str, Selection]
) -> tuple[str, str]:
    """The precision of the fastest products on ``device``, and why."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip or capability >= (8, 0):
            return "bf16", "this GPU multiplies it in tensor cores"
        if capability >= (7, 0):
            return "fp16", "this GPU multiplies it in tensor cores, and bf16 without them"
        return "fp32", "this GPU has no tensor cores, which multiply bf16 and fp16"
    if selections["bf16"].chosen == "cpu":
        return "bf16", "the engine multiplies it on this CPU"
    if selections["fp32"].chosen == "cpu":
        return "fp32", selections["bf16"].reasons["cpu"]
    return "fp32", (
        "in plain PyTorch, bf16 is slower on a CPU without AVX512_BF16, and little faster on others"
    )


def _engine() -> str:
    """The engine's file, and the PyTorch that it was compiled for."""
    if reason := cpu_engine.load_error():
        return f"none, {reason}"
    return f"{cpu_engine.file()}, compiled for PyTorch {torch.ops.looped_fast.cpu_torch()}"


def _missing_extras() -> list[str]:
    """A line on each extra of which something is not installed, with the remedy."""
    lines = []
    for extra, (modules, purpose) in _EXTRAS.items():
        if missing := [module for module in modules if find_spec(module) is None]:
            lines.append(
                f"not installed, for {purpose}: {', '.join(missing)} ({pip_install(extra)})"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
