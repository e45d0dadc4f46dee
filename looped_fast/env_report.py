"""Print the environment for a bug report: ``python -m looped_fast.env_report``."""

from __future__ import annotations

import platform

import torch
from torch.utils.collect_env import get_pretty_env_info

from looped_fast.config import VERSION, ModelConfig
from looped_fast.dropin import explain_backend
from looped_fast.model import LoopedTransformer


def report() -> str:
    """Versions, hardware and the selected backend for the paper's model, as text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LoopedTransformer(ModelConfig()).to(device)
    lines = [
        f"looped_fast {VERSION}, Python {platform.python_version()}",
        f"CPU instructions: {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
    ]
    for precision in ("fp32", "bf16"):
        lines.append(
            f"{precision} on {device}: "
            f"{explain_backend(model, batch_size=64, n_points=41, precision=precision)}"
        )
    return "\n".join([*lines, "", get_pretty_env_info()])


if __name__ == "__main__":
    print(report())
