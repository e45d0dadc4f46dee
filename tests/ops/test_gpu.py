"""Tests that need a GPU; ``make gpu-check`` runs them. Memory is poisoned, as in all tests."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import (
    CALL,
    FP32_EPS,
    cast,
    changed,
    leaves,
    loop_inputs,
    relative_error,
    require_grad,
)
from torch import Tensor

from looped_fast import LoopedTransformer, ModelConfig, ops
from looped_fast.ops import backends, reference
from looped_fast.ops.call import LoopSettings
from looped_fast.ops.graphs import CudaGraph, Graphs, graphs_on
from looped_fast.tasks import TASKS, make_task, sample_batch
from looped_fast.train import main
from looped_fast.training.config import CurriculumConfig, ScheduleConfig
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
CONFIG = ModelConfig(n_dims=5, n_positions=11, n_embd=64, n_head=4, n_loops=6, window=4)


def on_device(inputs):
    return {
        name: value.to(DEVICE) if isinstance(value, Tensor) else [t.to(DEVICE) for t in value]
        for name, value in inputs.items()
    }


def states_and_gradients(inputs, grad: Tensor, **arguments) -> dict[str, Tensor]:
    """States of ``ops.loop``, and gradients of (states * grad).sum() by names of ``leaves``."""
    inputs = require_grad(inputs)
    states = ops.loop(**inputs, **arguments)
    (states * grad.to(states.dtype)).sum().backward()
    gradients = {name: t.grad for name, t in leaves(inputs).items() if t.grad is not None}
    return {"states": states.detach(), **gradients}


def check_loop(inputs, precision: str, backend: str = "triton", **arguments) -> None:
    """DESIGN.md: at most twice (gradients: three times) the error of plain PyTorch."""
    attention = arguments.pop("attention", "auto")
    inputs = on_device(inputs)
    grad = torch.randn(arguments["window"], *inputs["embeddings"].shape, device=DEVICE)
    arguments = {"backend": "reference", **arguments}
    truth = states_and_gradients(cast(inputs, torch.float64), grad, **arguments)
    arguments["precision"] = precision
    plain = states_and_gradients(cast(inputs, torch.float32), grad, **arguments)
    arguments |= {"backend": backend, "attention": attention}
    fast = states_and_gradients(cast(inputs, torch.float32), grad, **arguments)
    assert fast.keys() == truth.keys()
    for name, exact in truth.items():
        factor = 2 if name == "states" else 3
        limit = factor * relative_error(plain[name], exact) + 4 * FP32_EPS
        error = relative_error(fast[name], exact)
        assert error <= limit, f"{name}: error {error:.1e}, at most {limit:.1e} is right"


# --- the same numbers -----------------------------------------------------------------------------


def test_a_model_predicts_the_same_on_both_devices():
    model = LoopedTransformer(CONFIG).double()
    xs, ys = torch.randn(3, 11, 5).double(), torch.randn(3, 11).double()
    expected = model(xs, ys)
    actual = model.to(DEVICE)(xs.to(DEVICE), ys.to(DEVICE)).cpu()
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("n_loops", "window"), [(1, 1), (15, 15), (30, 15), (90, 15)])
def test_the_loop_at_paper_size_against_float64(n_loops, window, precision):
    inputs = loop_inputs(B=4, S=82, D=256)
    check_loop(inputs, precision, n_heads=8, n_loops=n_loops, window=window)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("injection", ["add", "mul"])
def test_the_loss_at_paper_size_against_float64(injection, precision):
    """As in training, the kernels read out, and start from the neutral state."""
    inputs = on_device(loop_inputs(B=4, S=82, D=256, n_outputs=1))
    del inputs["state"]
    targets = torch.randn(4, 41, 1, dtype=torch.float64, device=DEVICE)
    settings = {"n_heads": 8, "n_loops": 20, "window": 15, "n_supervised": 10}

    def gradients(dtype, precision, backend) -> dict[str, Tensor]:
        given = require_grad(cast(inputs, dtype))
        ops.loop_mse(
            **given, state=None, targets=targets.to(dtype), injection=injection,
            precision=precision, backend=backend, **settings,
        ).backward()  # fmt: skip
        return {name: tensor.grad for name, tensor in leaves(given).items()}

    truth = gradients(torch.float64, "fp32", "reference")
    plain = gradients(torch.float32, precision, "reference")
    fast = gradients(torch.float32, precision, "triton")
    for name, exact in truth.items():
        limit = 3 * relative_error(plain[name], exact) + 4 * FP32_EPS
        assert relative_error(fast[name], exact) <= limit, name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("injection", ["add", "mul"])
@pytest.mark.parametrize("S", [82, 202])
def test_a_prompt_alone_is_as_accurate_as_by_pytorch(S, injection, precision):
    """A single prompt runs in the kernels for few rows."""
    inputs = on_device(loop_inputs(B=1, S=S, D=256, n_outputs=1))
    del inputs["state"]

    def predictions(dtype, precision, backend) -> Tensor:
        return ops.loop(
            **cast(inputs, dtype), state=None, n_heads=8, n_loops=20, window=1,
            injection=injection, precision=precision, backend=backend,
        )  # fmt: skip

    truth = predictions(torch.float64, "fp32", "reference")
    plain = predictions(torch.float32, precision, "reference")
    fast = predictions(torch.float32, precision, "triton")
    assert relative_error(fast, truth) <= 2 * relative_error(plain, truth) + 4 * FP32_EPS


def test_tf32_is_as_good_as_pytorchs(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    check_loop(loop_inputs(B=4, S=82, D=256), "fp32", n_heads=8, n_loops=15, window=15)


@pytest.mark.parametrize(("D", "n_heads"), [(64, 4), (64, 1), (128, 4), (256, 4), (512, 8)])
def test_widths_and_head_widths(D, n_heads):
    inputs = loop_inputs(B=3, S=22, D=D)
    check_loop(inputs, "bf16", n_heads=n_heads, n_loops=3, window=2)


@pytest.mark.parametrize("injection", ["mul", "none", "every_block"])
@pytest.mark.parametrize("recompute", [False, True])
def test_injections_of_two_blocks(injection, recompute):
    inputs = loop_inputs(B=3, S=22, D=64, n_layer=2)
    settings = {"n_heads": 4, "n_loops": 3, "window": 2, "recompute": recompute}
    check_loop(inputs, "bf16", injection=injection, **settings)


@pytest.mark.parametrize("attention", ["triton", "sdpa", "flash_attn"])
@pytest.mark.parametrize("S", [22, 82, 202])
def test_providers_of_attention(attention, S):
    call = changed(CALL, device="cuda", precision="bf16", batch=4, seq_len=S, attention=attention)
    try:
        backends.select(changed(call, backend="triton"))
    except ValueError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise
    settings = {"n_heads": 8, "n_loops": 3, "window": 2, "attention": attention}
    check_loop(loop_inputs(B=4, S=S, D=256), "bf16", **settings)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_race_shows_in_repeated_runs(precision):
    """Results have the same bits in every run, whatever else the GPU does, and no poison."""
    inputs = on_device(cast(loop_inputs(B=5, S=82, D=256), torch.float32))
    grad = torch.randn(3, 5, 82, 256, device=DEVICE)
    noise, other = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    settings = {"n_heads": 8, "n_loops": 4, "window": 3, "precision": precision}

    def run() -> dict[str, Tensor]:
        return states_and_gradients(cast(inputs, torch.float32), grad, **settings, backend="triton")

    first = run()
    assert all(t.isfinite().all() for t in first.values())
    for i in range(20):
        with torch.cuda.stream(other):
            for _ in range(i):
                noise @ noise
        again = run()
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_200_training_steps_are_as_near_to_float64_as_pytorchs(precision):
    """Rounding errors grow in training, so the limit is how far plain PyTorch strays in the worse
    of two runs that differ only in the order of prompts.
    """

    def losses(backend: str, dtype=torch.float32, reverse=False) -> Tensor:
        torch.manual_seed(0)
        config = ModelConfig(n_dims=5, n_positions=11, n_embd=64, n_head=4, n_loops=6, window=4)
        model = LoopedTransformer(config, backend).to(DEVICE, dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        task, seen = make_task("lr", n_dims=5), []
        low = precision == "bf16" and dtype == torch.float32
        for step in range(200):
            xs, ys = sample_batch(task, 64, 11, seed=0, step=step, device=DEVICE)
            xs, ys = (t.flip(0) if reverse else t for t in (xs.to(dtype), ys.to(dtype)))
            with torch.autocast("cuda", torch.bfloat16, enabled=low):
                loss = (model(xs, ys) - ys).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        return torch.stack(seen)

    truth = losses("reference", torch.float64)
    plain = max(relative_error(losses("reference", reverse=r), truth) for r in (False, True))
    assert relative_error(losses("triton"), truth) <= 3 * plain + 4 * FP32_EPS


# --- sampling and training ------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_batches_are_drawn_on_the_device_and_repeat(task):
    first, again = (
        sample_batch(make_task(task, n_dims=5), 4, 7, seed=1, step=2, device=DEVICE)
        for _ in range(2)
    )
    assert first.xs.device.type == DEVICE.type
    assert torch.equal(first.xs, again.xs)
    assert torch.equal(first.ys, again.ys)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_memorises_four_prompts(tmp_path, amp):
    device = ["--device", DEVICE.type, "--cuda-graphs", "on"]
    args = ["--preset", "tiny", *device, "--amp", amp, "--out", str(tmp_path / "run")]
    few = ["--train-prompts", "4", "--batch-size", "4", "--steps", "200", "--log-every", "20"]
    assert main([*args, *few, "--curriculum.dims.start", "5"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    errors = [line["relative_error"] for line in map(json.loads, lines) if "loss" in line]
    assert errors[-1] < 0.2 * errors[0]


# --- graphs ---------------------------------------------------------------------------------------

CURRICULUM = CurriculumConfig(
    dims=ScheduleConfig(2, 1, 3), points=ScheduleConfig(3, 2, 4, 5), loops=ScheduleConfig(2, 1, 8)
)
MINI = {
    "n_embd": 64, "n_head": 4, "batch_size": 4, "n_points": 5, "n_positions": 5, "n_loops": 3,
    "window": 2, "n_dims": 4, "steps": 12, "clip_grad_norm": 0.5, "warmup_steps": 5,
    "device": DEVICE.type, "curriculum": CURRICULUM, "depth": None,
}  # fmt: skip


def trained(tmp_path, task: str, cuda_graphs: str, **changes) -> dict[str, Tensor]:
    config = dataclasses.replace(preset_config("tiny", task), **{**MINI, **changes})
    trainer = Trainer(dataclasses.replace(config, cuda_graphs=cuda_graphs), tmp_path)
    for _ in range(12):
        trainer.training_step()
    assert (trainer.graphs.unsupported is None) == (cuda_graphs == "on")
    return dict(trainer.model.named_parameters()) | {"sums": trainer._sums}


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_replayed_steps_train_as_eager_ones_bit_for_bit(tmp_path, task, amp):
    """The run has three stages; dims, learning rate and batches change within them."""
    eager = trained(tmp_path, task, "off", amp=amp)
    replayed = trained(tmp_path, task, "on", amp=amp)
    for name in eager:
        assert torch.equal(replayed[name], eager[name]), name


@pytest.mark.parametrize(
    "changes",
    [{"train_prompts": 9}, {"recompute": True}, {"backend": "reference"}, {"injection": "mul"},
     {"backend": "reference", "recompute": True}],
    ids=str,
)  # fmt: skip
def test_every_kind_of_step_is_captured(tmp_path, changes):
    eager = trained(tmp_path, "lr", "off", **changes)
    replayed = trained(tmp_path, "lr", "on", **changes)
    for name in eager:
        assert torch.equal(replayed[name], eager[name]), name


@pytest.mark.parametrize("task", ["lr", "dt"])
def test_every_stage_of_the_papers_curriculum_is_captured(tmp_path, task):
    config = dataclasses.replace(
        preset_config("paper", task), batch_size=8, amp="bf16", device=DEVICE.type,
        cuda_graphs="on",
    )  # fmt: skip
    trainer = Trainer(config, tmp_path)
    stages = {trainer.curriculum.at(step)[1:]: step for step in range(config.steps, -1, -100)}
    for first_step in sorted(stages.values()):
        trainer.step = first_step
        for _ in range(3):
            trainer.training_step()
    assert trainer._read_sums()["loss"] > 0


def test_inference_is_replayed_with_changed_weights_and_other_shapes():
    replayed = LoopedTransformer(CONFIG, cuda_graphs="on").to(DEVICE)
    eager = LoopedTransformer(CONFIG, cuda_graphs="off").to(DEVICE)
    for i in range(5):
        with torch.no_grad():
            for parameter in replayed.parameters():
                parameter.mul_(1.01)
            eager.load_state_dict(replayed.state_dict())
            for n in (5, 11):
                xs, ys = torch.randn(3, n, 5, device=DEVICE), torch.randn(3, n, device=DEVICE)
                assert torch.equal(replayed(xs, ys), eager(xs, ys)), (i, n)


def test_a_replay_draws_what_its_seed_says():
    generator = torch.Generator(DEVICE)
    graph = CudaGraph(DEVICE, generator)

    def draw() -> Tensor:
        return torch.randn(1000, generator=generator, device=DEVICE)

    generator.manual_seed(1)
    graph.warm_up(draw)
    drawn = graph.capture(draw)
    for seed in (3, 2**64 - 1, 3):
        generator.manual_seed(seed)
        graph.replay()
        expected = torch.randn(
            1000, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE
        )
        assert torch.equal(drawn, expected)


def test_graphs_are_evicted_when_their_memory_exceeds_the_budget():
    subject = Graphs(lambda: CudaGraph(DEVICE), budget=100_000_000)

    def work(x: Tensor) -> Tensor:
        return (x @ x).sum(0)

    inputs = [torch.randn(n, n, device=DEVICE) for n in (3000, 3100, 3200, 3300)]
    for _ in range(3):
        for x in inputs:  # 36 MB and more each
            assert torch.equal(subject.run(len(x), work, x), work(x))
    held = [captured.graph.n_bytes for captured in subject._captured.values()]
    assert 0 < sum(held) <= 100_000_000


def test_a_capture_that_fails_leaves_a_working_process():
    subject = graphs_on(DEVICE)
    x, stream = torch.ones(3, device=DEVICE), torch.cuda.current_stream()

    def work() -> Tensor:
        return x * x.sum().item()

    subject.run("key", work)
    with pytest.warns(UserWarning, match="CUDA graphs are off from here on: a capture failed"):
        assert subject.run("key", work).tolist() == [3, 3, 3]
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device=DEVICE).isfinite().all()
    fresh = graphs_on(DEVICE, "on")
    for _ in range(3):
        assert fresh.run("key", lambda y: 2 * y, x).tolist() == [2, 2, 2]


def test_a_user_may_capture_the_loop_in_a_graph_of_their_own():
    model = LoopedTransformer(CONFIG).to(DEVICE)
    xs, ys = torch.randn(3, 11, 5, device=DEVICE), torch.randn(3, 11, device=DEVICE)
    graph = CudaGraph(DEVICE)
    with torch.no_grad():
        expected = model(xs, ys)
        graph.warm_up(lambda: model(xs, ys))
        result = graph.capture(lambda: model(xs, ys))
        graph.replay()
    assert torch.equal(result, expected)


def test_float64_runs_on_the_reference(monkeypatch):
    inputs = on_device(loop_inputs(B=2, S=6, D=64))
    settings = {"n_heads": 4, "n_loops": 2, "window": 1}
    expected = reference.loop(**inputs, settings=LoopSettings(**settings))
    assert torch.equal(ops.loop(**inputs, **settings), expected)
