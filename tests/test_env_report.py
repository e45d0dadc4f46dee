"""The first lines of ``python -m looped_fast.env_report``, on machines of every kind."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import CALL, changed

from looped_fast import LoopedTransformer, ModelConfig, env_report, explain_backend
from looped_fast.config import PRECISIONS
from looped_fast.ops import backend_times, backends, cpu_engine

NO_BF16 = "bf16 needs a CPU with AVX512_BF16; precision fp32 runs"


def no_bf16(call):
    return None if call.settings.precision == "fp32" else NO_BF16


@pytest.fixture
def machine(monkeypatch):
    """Summarise a machine: its device, GPU, and why backends can't run there."""

    def summarise(device="cpu", capability=None, hip=None, **unsupported):
        if capability:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Example")
            monkeypatch.setattr(torch.version, "hip", hip)
            monkeypatch.setattr(backend_times, "lookup", lambda call: {})
            monkeypatch.setattr(backend_times, "failures", lambda call: {})
        for name, reason in unsupported.items():
            function = reason if callable(reason) else lambda call, reason=reason: reason
            monkeypatch.setitem(backends.UNSUPPORTED, name, function)
        selections = {
            p: backends.explain(changed(CALL, device=device, precision=p)) for p in PRECISIONS
        }
        lines = env_report.summary(torch.device(device), selections)
        assert 3 <= len(lines) <= 8
        assert all("\n" not in line for line in lines)
        return lines

    return summarise


def starting(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if line.startswith(start)]


def test_the_report_starts_with_the_backend_and_has_what_a_bug_report_needs(capsys):
    assert env_report.main([]) == 0
    text = capsys.readouterr().out
    summary, details, environment = text.split("\n\n", 2)
    model = LoopedTransformer(ModelConfig())
    if torch.cuda.is_available():
        model = model.cuda()
    precision = starting(summary.splitlines(), "precision: ")[0].split()[1]
    selected = explain_backend(model, 64, 41, precision)
    assert summary.startswith(f"backend: {selected.chosen}, ")
    assert details.startswith("looped_fast 0.")
    assert "CPU instructions: " in details
    for precision in PRECISIONS:
        device = next(model.parameters()).device.type
        selected = explain_backend(model, 64, 41, precision)
        assert f"{precision} on {device}: {selected}" in details
    assert "PyTorch version: " in environment


def test_the_report_needs_no_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        env_report.main(["--help"])
    assert stop.value.code == 0
    assert "usage: python -m looped_fast.env_report" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        env_report.main(["--verbos"])
    assert stop.value.code == 2


def test_a_cpu_with_the_engine_and_bf16(machine, monkeypatch):
    monkeypatch.setattr(cpu_engine, "thread_limit", lambda: None)
    lines = machine(cpu=None)
    assert lines[0].startswith("backend: cpu, the fused C++ engine, on 1 thread of this CPU (")
    assert lines[1].startswith("  not triton: ")
    assert starting(lines, "  not ") == [lines[1]]  # no slower backend
    assert starting(lines, "precision: bf16 (train --amp bf16; accelerate(model, precision=")


def test_fewer_threads_than_pytorch_has_are_explained(machine, monkeypatch):
    monkeypatch.setattr(cpu_engine, "thread_limit", lambda: "on 1 of 2 threads, since a cgroup ...")
    assert "C++ engine, on 1 of 2 threads, since a cgroup ... (" in machine(cpu=None)[0]


def test_a_cpu_without_bf16_gets_fp32_and_the_reason(machine):
    lines = machine(cpu=no_bf16)
    assert lines[0].startswith("backend: cpu, ")
    assert f"precision: fp32 (the default) is fastest here: {NO_BF16}" in lines


def test_without_the_engine_the_remedy_is_among_the_first_lines(machine):
    lines = machine(cpu="it was not built; run this")
    assert lines[0].startswith("backend: reference, plain PyTorch, on 1 thread of this CPU")
    assert "  not cpu: it was not built; run this" in lines
    [precision] = starting(lines, "precision: ")
    assert precision.startswith("precision: fp32 (the default)")
    assert "bf16 is slower on a CPU without AVX512_BF16" in precision


def test_without_compiler_or_engine_there_is_a_line_on_each(machine):
    lines = machine(cpu="no engine", compiled="no g++", triton="no GPU")
    assert starting(lines, "  not ") == [
        "  not triton: no GPU", "  not cpu: no engine", "  not compiled: no g++"
    ]  # fmt: skip


def test_a_gpu_with_triton_and_without_flash_attn(machine, monkeypatch):
    providers = pytest.importorskip("looped_fast.kernels.providers", exc_type=ImportError)
    missing = "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    monkeypatch.setattr(providers, "_flash_attn_load_error", lambda: missing)
    lines = machine("cuda", (9, 0), triton=None, compiled=None)
    assert lines[0].startswith("backend: triton, this project's Triton kernels, on NVIDIA Example")
    assert starting(lines, "precision: bf16 (train --amp bf16; ")
    assert starting(lines, "  fp32 runs on reference, not triton: predicted slower than cuBLAS")
    assert "attention: triton" in lines
    assert f"  not flash_attn: {missing}" in lines
    assert not starting(lines, "no GPU")


@pytest.mark.parametrize("reason", ["Triton is not installed (pip install it)", "Triton is 3.5"])
def test_a_gpu_without_the_kernels_triton(machine, reason):
    lines = machine("cuda", (8, 6), triton=reason, compiled=None)
    assert lines[0].startswith("backend: reference, plain PyTorch, on NVIDIA Example")
    assert lines[1] == f"  not triton: {reason}"
    assert starting(lines, "precision: bf16 ")
    assert not starting(lines, "  fp32 runs on")


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((12, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")],
)
def test_the_precision_of_a_gpu_is_that_of_its_tensor_cores(machine, capability, precision):
    lines = machine("cuda", capability, triton="not here")
    [line] = starting(lines, "precision: ")
    assert line.startswith(f"precision: {precision} (")
    assert "tensor cores" in line


def test_an_amd_gpu_multiplies_bf16(machine):
    lines = machine("cuda", (6, 1), hip="6.4", triton="not here")  # capabilities are NVIDIA's
    assert starting(lines, "precision: bf16 ")


@pytest.mark.parametrize(
    ("cuda", "hip", "expected"),
    [
        (None, None, "built for CPUs alone, sees none; if this machine has one, install another"),
        ("12.8", None, "built for CUDA 12.8, sees none; if this machine has one, look at its dri"),
        (None, "6.4", "built for ROCm, sees none; if this machine has one, look at its driver"),
    ],
)
def test_a_cpu_is_told_why_no_gpu_is_used(machine, monkeypatch, cuda, hip, expected):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    [line] = starting(machine(), "no GPU: ")
    assert f"PyTorch {torch.__version__}, {expected}" in line


def test_a_mac_is_not_told_to_look_for_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not starting(machine(), "no GPU: ")


def missing_lines(monkeypatch, machine, *missing):
    monkeypatch.setattr(
        env_report, "find_spec", lambda module: None if module in missing else object()
    )
    return starting(machine(), "not installed, ")


def test_extras_that_are_missing_get_a_line_each(machine, monkeypatch):
    assert missing_lines(monkeypatch, machine) == []
    [evaluation] = missing_lines(monkeypatch, machine, "sklearn", "xgboost")
    assert evaluation.endswith(": sklearn, xgboost (pip install scikit-learn pandas xgboost-cpu)")
    [logging] = missing_lines(monkeypatch, machine, "wandb")
    assert logging.endswith(": wandb (pip install wandb)")
    assert len(missing_lines(monkeypatch, machine, "pandas", "wandb")) == 2
