"""The ``compiled`` backend and the measured choice on a GPU; ``make gpu-check`` runs them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import loop_inputs
from test_gpu import DEVICE, MINI, check_loop

from looped_fast import LoopedTransformer, ModelConfig, explain_backend
from looped_fast.ops import backend_times
from looped_fast.training import backend_autotune
from looped_fast.training.config import CurriculumConfig
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture
def measured_choice(monkeypatch, tmp_path):
    """Turn the choice on: no deterministic mode, no least length of a run, an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backend_autotune, "MIN_SECONDS", 0)
    torch.use_deterministic_algorithms(False)
    backend_times._known.cache_clear()
    yield
    backend_times._known.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_loop_at_paper_size_against_float64(precision):
    inputs = loop_inputs(B=4, S=82, D=256)
    check_loop(inputs, precision, backend="compiled", n_heads=8, n_loops=20, window=15)


def train(tmp_path, cuda_graphs: str, **changes) -> Trainer:
    settings = {**MINI, "curriculum": CurriculumConfig(), "amp": "bf16", **changes}
    config = dataclasses.replace(preset_config("tiny", "lr"), **settings)
    trainer = Trainer(dataclasses.replace(config, cuda_graphs=cuda_graphs), tmp_path)
    for _ in range(8):
        trainer.training_step()
    return trainer


def test_a_compiled_step_is_captured_and_trains_as_an_eager_one_bit_for_bit(tmp_path):
    eager = dict(train(tmp_path, "off", backend="compiled").model.named_parameters())
    replayed = train(tmp_path, "on", backend="compiled")
    assert replayed.graphs.unsupported is None
    for name, parameter in replayed.model.named_parameters():
        assert torch.equal(parameter, eager[name]), name


def test_compiled_inference_is_replayed():
    config = ModelConfig(n_dims=5, n_positions=11, n_embd=64, n_head=4, n_loops=6, window=4)
    replayed = LoopedTransformer(config, "compiled", cuda_graphs="on").to(DEVICE)
    eager = LoopedTransformer(config, "compiled", cuda_graphs="off").to(DEVICE)
    eager.load_state_dict(replayed.state_dict())
    with torch.no_grad():
        for _ in range(5):
            xs, ys = torch.randn(3, 11, 5, device=DEVICE), torch.randn(3, 11, device=DEVICE)
            assert torch.equal(replayed(xs, ys), eager(xs, ys))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_training_run_measures_and_takes_the_faster(tmp_path, measured_choice, amp):
    config = dataclasses.replace(
        preset_config("paper", "lr"), steps=100, amp=amp, device=DEVICE.type, cuda_graphs="on",
        curriculum=CurriculumConfig(),
    )  # fmt: skip
    trainer = Trainer(config, tmp_path)
    line = trainer.measure_backends()
    print(line)
    assert "failed" not in line
    precision = "fp32" if amp == "off" else amp
    size = {"batch_size": config.batch_size, "n_points": config.n_points, "precision": precision}
    explanation = explain_backend(trainer.model, **size, replayed_training=True)
    (times,) = (t for kind, t in backend_times._known().items() if "/training step/" in kind)
    contenders = {"triton", "compiled"} | ({"reference"} if amp == "off" else set())
    assert set(times) == contenders
    assert explanation.chosen == min(times, key=times.__getitem__)
    for _ in range(4):
        trainer.training_step()
    assert trainer.graphs.unsupported is None
    assert trainer._read_sums()["loss"] > 0
    assert trainer.measure_backends() is None
