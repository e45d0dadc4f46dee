"""What only a GPU can show; ``make gpu-check`` runs it."""

import json

import pytest
import torch

from looped_fast import LoopedTransformer, ModelConfig
from looped_fast.tasks import TASKS, make_task, sample_batch
from looped_fast.train import main

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(n_dims=5, n_positions=11, n_embd=64, n_head=4, n_loops=6, window=4)


def test_a_model_predicts_the_same_on_both_devices():
    model = LoopedTransformer(CONFIG).double()
    xs, ys = torch.randn(3, 11, 5).double(), torch.randn(3, 11).double()
    expected = model(xs, ys)
    actual = model.cuda()(xs.cuda(), ys.cuda()).cpu()
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("task", TASKS)
def test_batches_are_drawn_on_the_device_and_repeat(task):
    first, again = (
        sample_batch(make_task(task, n_dims=5), 4, 7, seed=1, step=2, device="cuda")
        for _ in range(2)
    )
    assert first.xs.is_cuda
    assert torch.equal(first.xs, again.xs)
    assert torch.equal(first.ys, again.ys)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_memorises_four_prompts(tmp_path, amp):
    args = ["--preset", "tiny", "--device", "cuda", "--amp", amp, "--out", str(tmp_path / "run")]
    few = ["--train-prompts", "4", "--batch-size", "4", "--steps", "200", "--log-every", "20"]
    assert main([*args, *few, "--curriculum.dims.start", "5"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    errors = [line["relative_error"] for line in map(json.loads, lines) if "loss" in line]
    assert errors[-1] < 0.2 * errors[0]
