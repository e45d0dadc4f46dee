"""Fixtures for every test (poisoned memory, fixed seeds), and a naive loop to compare with."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Triton decides at import whether kernels are interpreted on the CPU; `make gpu-check` says no.
os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"

import hypothesis
import pytest
import torch
from torch import Tensor

from looped_fast import LoopedTransformer, ModelConfig
from looped_fast.ops import backends, cpu_engine, triton_backend
from looped_fast.ops.call import Call, LoopSettings
from looped_fast.training.lock import hold

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

FP32_EPS = torch.finfo(torch.float32).eps

needs_engine = pytest.mark.skipif(
    cpu_engine.unsupported_precision("fp32") is not None,
    reason=f"no CPU engine: {cpu_engine.unsupported_precision('fp32')}",
)

# Why kernels can't be tested here, or None.
NO_TRITON = triton_backend.load_error() or (
    triton_backend.uninterpretable() if INTERPRETING else None
)
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
collect_ignore = ["fake_h100.py", "interpreted_kernels.py"] if NO_TRITON else []

# A call of the paper's model, to select a backend for.
CALL = Call(
    LoopSettings(n_heads=8, n_loops=30, window=15),
    device=torch.device("cpu"),
    dtype=torch.float32,
    batch=64,
    seq_len=82,
    n_embd=256,
    n_layer=1,
)


def changed(call: Call, **changes: Any) -> Call:
    """Copy ``call`` with other settings or other properties of its tensors."""
    if "device" in changes:
        changes["device"] = torch.device(changes["device"])
    of_settings = {name: changes.pop(name) for name in LoopSettings._fields if name in changes}
    return call._replace(settings=call.settings._replace(**of_settings), **changes)


@pytest.fixture(autouse=True)
def fresh_selections() -> Iterator[None]:
    """Forget selections: tests change what backends support, which is no part of their key."""
    backends._remembered.cache_clear()
    yield
    backends._remembered.cache_clear()


# Slow files start first, so that no core runs one alone at the end.
LONGEST = (
    "test_cpu_engine_sanitizer.py", "test_cpu_engine_robustness.py", "test_baselines.py",
    "test_distributed.py", "test_ops.py", "test_cpu_engine.py", "test_train_command.py",
    "test_compiled_backend.py", "test_collection.py", "test_compile_report.py", "test_loop_mse.py",
    "test_triton_backend.py", "test_kernels_backward.py", "test_reproduce.py",
    "test_trainer_graphs.py", "test_evaluate.py", "test_benchmarks_gpu.py",
    "test_train_command_errors.py", "test_examples.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tensors are tiny here, so threads only cost time
    if INTERPRETING and NO_TRITON is None:
        import interpreted_kernels

        interpreted_kernels.make_fast()
    if getattr(config.option, "cov_source", None):
        import without_coverage

        without_coverage.leave_out_compilers()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("gpu") and INTERPRETING:
        pytest.skip("needs compiled kernels: TRITON_INTERPRET=0, as make gpu-check sets it")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every ``empty`` with NaN, C++'s ``at::empty`` too, so an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let PyTorch use two threads, where other tests use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plot at the end of a training run, which takes longer than a tiny run."""
    monkeypatch.setattr("looped_fast.train.plot", lambda *_: None)


@contextlib.contextmanager
def held_elsewhere(run_dir: Path) -> Iterator[None]:
    """Hold the lock on ``run_dir`` in another thread, which is as good as another process."""
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as stack:
        thread.submit(stack.enter_context, hold(run_dir)).result()
        try:
            yield
        finally:
            thread.submit(stack.close).result()


def random_weights(D: int, n_layer: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Weights of ``ops.loop``, none of them at a value (0 or 1) that hides a mistake."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=dtype) / math.sqrt(columns)

    def bias(size: int) -> Tensor:
        return 0.2 * torch.randn(size, dtype=dtype)

    def norm() -> list[Tensor]:
        return [1 + bias(D), bias(D)]

    weights = []
    for _ in range(n_layer):
        weights += [*norm(), matrix(3 * D, D), bias(3 * D), matrix(D, D), bias(D)]
        weights += [*norm(), matrix(4 * D, D), bias(4 * D), matrix(D, 4 * D), bias(D)]
    return [*weights, *norm()]


def loop_inputs(
    B: int = 2,
    S: int = 6,
    D: int = 16,
    n_layer: int = 1,
    dtype: torch.dtype = torch.float64,
    n_outputs: int = 0,
) -> dict[str, Any]:
    """Make tensor arguments of ``ops.loop``, with a read-out if ``n_outputs`` is not 0."""
    inputs = {
        "embeddings": torch.randn(B, S, D, dtype=dtype),
        "positions": torch.randn(S, D, dtype=dtype),
        "state": torch.randn(B, S, D, dtype=dtype),
        "weights": random_weights(D, n_layer, dtype),
    }
    if n_outputs:
        weight, bias = torch.randn(n_outputs, D, dtype=dtype), torch.randn(n_outputs, dtype=dtype)
        inputs["read_out"] = [weight, bias]
    return inputs


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Name -> tensor of ``loop_inputs``; each tensor of a list gets its own name."""
    named = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            named[name] = value
        else:
            named |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
    return named


def require_grad(inputs: dict[str, Any]) -> dict[str, Any]:
    for tensor in leaves(inputs).values():
        tensor.requires_grad_()
    return inputs


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Detached copies in another dtype."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(dtype, copy=True)
        return [copied(tensor) for tensor in value]

    return {name: copied(value) for name, value in inputs.items()}


def naive_step(
    z: Tensor, e: Tensor, p: Tensor, weights: Sequence[Tensor], n_heads: int, injection: str
) -> Tensor:
    """One loop step from formulas alone: no ``torch.nn.functional``, no code of the package."""

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    S, D = p.shape
    width = D // n_heads
    past = torch.ones(S, S).tril().bool()
    x = {"add": z + e, "mul": z * e, "none": z, "every_block": z}[injection] + p
    for first in range(0, len(weights) - 2, 12):
        g1, b1, w_qkv, b_qkv, w_o, b_o, g2, b2, w_fc, b_fc, w_proj, b_proj = weights[
            first : first + 12
        ]
        if injection == "every_block":
            x = x + e
        qkv = norm(x, g1, b1) @ w_qkv.T + b_qkv
        heads = []
        for h in range(n_heads):
            q, k, v = (qkv[..., i * D + h * width : i * D + (h + 1) * width] for i in range(3))
            scores = q @ k.transpose(1, 2) / math.sqrt(width)
            weight = scores.exp() * past
            heads.append(weight / weight.sum(-1, keepdim=True) @ v)
        x = x + torch.cat(heads, -1) @ w_o.T + b_o
        x = x + gelu(norm(x, g2, b2) @ w_fc.T + b_fc) @ w_proj.T + b_proj
    return norm(x, *weights[-2:])


def naive_loop(
    inputs: dict[str, Any], n_heads: int, n_loops: int, window: int, injection: str = "add"
) -> Tensor:
    """``ops.loop`` by formulas, with truncated backpropagation written out as a detach."""
    z, states = inputs["state"], []
    for i in range(n_loops):
        args = inputs["embeddings"], inputs["positions"], inputs["weights"], n_heads, injection
        z = naive_step(z, *args)
        if i < n_loops - window:
            z = z.detach()
        else:
            states.append(z)
    states = torch.stack(states)
    if "read_out" in inputs:
        weight, bias = inputs["read_out"]
        return (states @ weight.T + bias)[:, :, ::2]  # tokens of x
    return states


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative error of the whole tensor, in the Euclidean norm."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


SMALL = ModelConfig(n_dims=3, n_positions=8, n_embd=16, n_head=2, n_loops=4, window=2)


def small_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LoopedTransformer:
    """A model with weights large enough that every part of it matters."""
    model = LoopedTransformer(ModelConfig(**{**SMALL.to_dict(), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def prompt(B: int = 2, n: int = 5, d: int = 3, dtype: torch.dtype = torch.float32):
    return torch.randn(B, n, d, dtype=dtype), torch.randn(B, n, dtype=dtype)
