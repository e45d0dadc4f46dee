"""Checks an installation of looped_fast from the outside: ``python smoke.py --backend cpu``.

``make dist`` and cibuildwheel run it in a fresh environment, from a folder that holds nothing. It
needs no package but looped_fast, and imports nothing of the source tree.
"""

import argparse
import importlib.metadata
import importlib.resources
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import looped_fast
from looped_fast import LoopedTransformer, ModelConfig, explain_backend
from looped_fast.ops import cpu_engine
from looped_fast.train import main as train

CONFIG = ModelConfig(n_dims=5, n_positions=21, n_embd=64, n_head=4, n_loops=6, window=3)


def check_package(source):
    """The package is the installed one, and has what is no Python."""
    folder = Path(looped_fast.__file__).parent
    assert source in folder.parents if source else "site-packages" in folder.parts, folder
    assert importlib.metadata.version("looped_fast") == looped_fast.__version__
    for room, file in {"csrc": "ops.cpp", "kernels": "candidates.json"}.items():
        assert importlib.resources.files(f"looped_fast.{room}").joinpath(file).is_file(), file
    for name in looped_fast.pretrained.names():
        looped_fast.from_pretrained(name)
    assert (folder / "py.typed").is_file()
    for command in ["looped-fast"], [sys.executable, "-m", "looped_fast"]:
        command[0] = str(Path(sys.executable).parent / command[0])
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert looped_fast.__version__ in shown.stdout


def check_numbers(backend):
    """The chosen backend's error is at most twice (gradients: three times) plain PyTorch's."""
    torch.manual_seed(0)
    model = LoopedTransformer(CONFIG)
    xs, ys = torch.randn(4, 20, 5), torch.randn(4, 20)
    chosen = str(explain_backend(model, batch_size=4, n_points=20))
    print(chosen)
    assert chosen.startswith(f"backend: {backend}"), chosen
    results = {}
    for name in "auto", "reference", "exact":
        copy = LoopedTransformer(CONFIG, backend="auto" if name == "auto" else "reference")
        copy.load_state_dict(model.state_dict())
        dtype = torch.float64 if name == "exact" else torch.float32
        copy.to(dtype)
        predictions = copy(xs.to(dtype), ys.to(dtype))
        predictions.square().mean().backward()
        results[name] = [predictions.detach(), *(p.grad for p in copy.parameters())]
    for i, (ours, plain, exact) in enumerate(zip(*results.values(), strict=True)):
        limit = (3 if i else 2) * (plain - exact).norm() + 1e-7 * exact.norm()
        error = (ours - exact).norm()
        assert error <= limit, (error, limit)


def check_training(folder):
    """Ten steps of the main command; what they save can be loaded."""
    out = folder / "run"
    status = train(["--task", "lr", "--preset", "tiny", "--steps", "10", "--out", str(out)])
    assert status == 0
    looped_fast.pretrained.load_run(str(out))


def main():
    """Run every check; the first that fails raises."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True, help="that must be chosen on the CPU")
    parser.add_argument("--source", type=Path, help="the folder of an editable installation")
    options = parser.parse_args()
    check_package(options.source)
    check_numbers(options.backend)
    with tempfile.TemporaryDirectory() as folder:
        check_training(Path(folder))
    print(f"smoke test passed: {options.backend}, engine {cpu_engine.file()}")


if __name__ == "__main__":
    main()
