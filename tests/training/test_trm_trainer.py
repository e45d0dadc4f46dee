"""Deep supervision: carry, halting and replacement, average, and runs that resume bit by bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from looped_fast.errors import CheckpointError
from looped_fast.model import Carry
from looped_fast.tasks import sudoku
from looped_fast.training import checkpoint
from looped_fast.training.fit import NonFiniteError
from looped_fast.training.log import METRICS_FILE, read_metrics
from looped_fast.training.trm.config import trm_preset
from looped_fast.training.trm.loss import supervision_loss
from looped_fast.training.trm.trainer import TRMTrainer

CONFIG = dataclasses.replace(
    trm_preset("tiny"), hidden_size=32, num_heads=2, H_cycles=2, L_cycles=1, batch_size=6, steps=12,
    halt_max_steps=3, warmup_steps=2, lr=0.01, eval_puzzles=8, log_every=5, eval_every=6,
    save_every=7, device="cpu", backend="reference",
)  # fmt: skip


class Killed(BaseException):
    """Simulates a kill."""


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(sudoku, "_TRAINING_POOL", 64)
    sudoku._training_pool.cache_clear()
    yield
    sudoku._training_pool.cache_clear()


def newest(run_dir):
    latest = checkpoint.latest(run_dir)
    return None if latest is None else checkpoint.load(latest)


def train(run_dir, killed_at=None, **changes):
    run_dir.mkdir(exist_ok=True)
    trainer = TRMTrainer(dataclasses.replace(CONFIG, **changes), run_dir, newest(run_dir))
    step = trainer.training_step

    def training_step():
        if trainer.step == killed_at:
            raise Killed
        step()

    trainer.training_step = training_step
    if killed_at is None:
        trainer.fit()
    else:
        with pytest.raises(Killed):
            trainer.fit()
    return trainer


def state(trainer):
    """All tensors of a run, by name."""
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {f"{i}.{k}": t for i, tensors in optimizer.items() for k, t in tensors.items()}
    average = {f"average.{k}": t for k, t in trainer.average.state_dict().items()}
    return {**trainer._run_state().state_dict(), **average, **moments}


def log(run_dir):
    lines = read_metrics(run_dir / METRICS_FILE)
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]


# ---- a step


def test_a_step_is_that_of_the_formulas(tmp_path):
    """Written out again: loss on the carried states, AdamW with warm-up, average."""
    trainer, plain = (TRMTrainer(CONFIG, tmp_path) for _ in range(2))
    model, weights = plain.model, list(plain.model.parameters())
    average = [w.detach().double().clone() for w in weights]
    adam = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    carry = None
    batch = trainer.task.training_batch(6, CONFIG.seed, 0)  # nothing halts before step 3
    for step in range(3):
        trainer.training_step()
        output = model(batch.inputs, carry)
        carry = output.carry
        supervision_loss(output, batch.labels).total.backward()
        adam.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 2)
        adam.step()
        adam.zero_grad()
        average = [0.99 * a + 0.01 * w.detach() for a, w in zip(average, weights, strict=True)]
    for name, found, wanted, mean in zip(
        dict(model.named_parameters()), trainer.model.parameters(), weights, average, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7, msg=name)
        kept = trainer.average.get_parameter(name)
        torch.testing.assert_close(kept.double(), mean, rtol=1e-5, atol=1e-7, msg=name)
    torch.testing.assert_close(trainer.sequences.z_H, carry.z_H, rtol=1e-4, atol=1e-5)


def test_puzzles_are_replaced_when_they_halt(tmp_path):
    trainer = TRMTrainer(dataclasses.replace(CONFIG, halt_exploration_prob=0.0), tmp_path)
    now = trainer.sequences
    trainer.training_step()
    assert now.n_steps.tolist() == [1] * 6
    assert not now.halted.any()  # q_halt starts at -5
    now.halted[2] = True
    before, batch = now.inputs.clone(), trainer.task.training_batch(6, CONFIG.seed, 1)
    seen = {}
    forward = trainer.model.forward

    def spy(inputs, carry, identifiers):
        seen.update(inputs=inputs.clone(), z_H=carry.z_H.clone(), z_L=carry.z_L.clone())
        return forward(inputs, carry, identifiers)

    trainer.model.forward = spy
    trainer.training_step()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(seen["inputs"][others], before[others])
    assert torch.equal(seen["inputs"][2], batch.inputs[2])
    assert torch.equal(now.labels[2], batch.labels[2])
    assert now.n_steps.tolist() == [2, 2, 1, 2, 2, 2]
    for name in ("H", "L"):
        start = getattr(trainer.model, f"{name}_init").expand_as(seen[f"z_{name}"][0])
        assert torch.equal(seen[f"z_{name}"][2], start)
        assert not torch.equal(seen[f"z_{name}"][0], start)


@pytest.mark.parametrize(
    ("q", "n_steps", "halts"), [(1.0, 1, True), (-1.0, 1, False), (-1.0, 3, True), (0.0, 2, False)]
)
def test_a_puzzle_halts_by_q_or_at_the_last_step(tmp_path, q, n_steps, halts):
    trainer = TRMTrainer(dataclasses.replace(CONFIG, halt_exploration_prob=0.0), tmp_path)
    trainer.sequences.n_steps.fill_(n_steps)
    assert trainer._halting(torch.full((6,), q)).tolist() == [halts] * 6


def test_exploration_delays_halting_to_a_random_step(tmp_path):
    config = dataclasses.replace(
        CONFIG, halt_exploration_prob=0.5, halt_max_steps=5, batch_size=4000
    )
    trainer = TRMTrainer(config, tmp_path)
    q, shares = torch.ones(4000), []
    for n_steps in (1, 2, 3, 4, 5):
        trainer.sequences.n_steps.fill_(n_steps)
        shares.append(trainer._halting(q).double().mean().item())
    # Half of the puzzles wait for a step that is uniform over 2, 3, 4, 5.
    assert shares == pytest.approx([0.5, 0.625, 0.75, 0.875, 1], abs=0.04)


def test_one_supervision_step_leaves_nothing_to_explore(tmp_path):
    trainer = train(tmp_path, halt_max_steps=1, steps=2)
    assert trainer.sequences.halted.all()


def test_the_states_carry_no_gradient(tmp_path):
    trainer = TRMTrainer(CONFIG, tmp_path)
    trainer.training_step()
    assert not any(t.requires_grad for t in trainer.sequences.state_dict().values())
    assert isinstance(trainer._forward()[0].carry, Carry)


def test_an_evaluation_and_a_trial_change_nothing(tmp_path):
    trainer = TRMTrainer(CONFIG, tmp_path)
    trainer.training_step()
    before = {name: tensor.clone() for name, tensor in state(trainer).items()}
    trainer.evaluation()
    assert trainer.estimate_seconds() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items())


def test_rate_zero_keeps_no_average(tmp_path):
    trainer = train(tmp_path, ema_rate=0.0, steps=2)
    for average, weight in zip(
        trainer.average.parameters(), trainer.model.parameters(), strict=True
    ):
        assert torch.equal(average, weight)


# ---- runs


@pytest.mark.parametrize(
    "changes",
    [{}, {"amp": "bf16"}, {"task": "sudoku6"}, {"log_every": 100}, {"backend": "auto"}],
    ids=str,
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, changes):
    whole = train(tmp_path / "whole", **changes)
    train(tmp_path / "parts", killed_at=9, **changes)
    assert newest(tmp_path / "parts").step == 7
    torch.rand(7)
    parts = train(tmp_path / "parts", **changes)
    assert parts.step == whole.step == 12
    wanted = state(whole)
    assert state(parts).keys() == wanted.keys()
    assert [n for n, t in state(parts).items() if not torch.equal(t, wanted[n])] == []
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_the_log_has_loss_accuracy_and_loops(tmp_path):
    train(tmp_path)
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [5, 6, 10, 12, 12]
    assert lines[0].keys() >= {"loss", "cell_loss", "halt_loss", "grad_norm", "lr"}
    assert lines[0]["supervision_steps"] == 3  # those that halted: all at step 3
    assert len(lines[1]["eval_solved_after"]) == 3
    assert 0 < lines[1]["eval_cells"] < 1


def test_a_checkpoint_shares_the_average(tmp_path):
    trainer = train(tmp_path)
    saved = newest(tmp_path)
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(saved.model_state[name], trainer.average.get_parameter(name))
        assert torch.equal(saved.run_state[f"weights.{name}"], weight)
        assert not torch.equal(saved.model_state[name], weight)


def test_a_run_does_not_resume_with_other_sizes(tmp_path):
    train(tmp_path)
    with pytest.raises(CheckpointError, match=r"sequences.inputs is int64 \[6, 16\].*--batch-size"):
        TRMTrainer(dataclasses.replace(CONFIG, batch_size=4), tmp_path, newest(tmp_path))
    with pytest.raises(CheckpointError, match="of another model"):
        TRMTrainer(dataclasses.replace(CONFIG, hidden_size=64), tmp_path, newest(tmp_path))


def test_a_run_that_diverges_saves_nothing_of_it(tmp_path):
    train(tmp_path, killed_at=7)
    trainer = TRMTrainer(CONFIG, tmp_path, newest(tmp_path))
    trainer.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"at step 8.*step-00000007.*lower --lr"):
        trainer.fit()
    assert newest(tmp_path).step == 7
