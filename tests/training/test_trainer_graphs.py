"""Training steps replayed as graphs, tested without a GPU: see ``fake_graphs``."""

import dataclasses

import pytest
import torch
from conftest import needs_engine, needs_triton
from fake_graphs import FakeGraph, Recorder

from looped_fast.ops.graphs import Graphs
from looped_fast.tasks import OFFICIAL_TASK_NAMES, TASKS
from looped_fast.training.config import CurriculumConfig, ScheduleConfig
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

# Three stages (n_points, n_loops) in twelve steps, n_dims changing within them too.
CURRICULUM = CurriculumConfig(
    dims=ScheduleConfig(2, 1, 3), points=ScheduleConfig(3, 2, 4, 5), loops=ScheduleConfig(2, 1, 8)
)
# One stage throughout, n_dims changing.
DIMS_ALONE = CurriculumConfig(dims=ScheduleConfig(2, 1, 3))
MINI = {
    "n_embd": 32, "n_head": 2, "batch_size": 4, "n_points": 5, "n_positions": 5, "n_loops": 3,
    "window": 2, "n_dims": 4, "steps": 12, "clip_grad_norm": 0.5, "warmup_steps": 5,
    "lr_decay": "cosine", "seed": 3, "device": "cpu", "backend": "reference",
    "curriculum": CURRICULUM,
}  # fmt: skip


PAPERS = OFFICIAL_TASK_NAMES.values()
EVERY = pytest.mark.parametrize(
    ("task", "amp"),
    [(task, amp) for task in PAPERS for amp in ("off", "bf16", "fp16")]
    + [(task, "off") for task in TASKS if task not in PAPERS],
)


@pytest.fixture(autouse=True)
def unchecked_prompts(monkeypatch):
    """Turn off the check of prompt values, which only runs on CPUs."""
    monkeypatch.setattr("looped_fast.model.transformer.check_prompt", lambda *_: None)


def make_trainer(tmp_path, task="lr", **changes):
    config = dataclasses.replace(preset_config("tiny", task), **{**MINI, **changes})
    return Trainer(config, tmp_path)


def graphed(trainer, graph=FakeGraph):
    calls = []
    trainer.graphs = Graphs(lambda: graph(calls), budget=10**9)
    return calls


def train(trainer, steps=12):
    for _ in range(steps):
        trainer.training_step()
    state = {f"parameter {name}": p for name, p in trainer.model.named_parameters()}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{kind} {i}": tensor for kind, tensor in moments.items()}
    scale = torch.tensor(trainer.scaler.get_scale())
    return state | {"sums": trainer._sums, "scale": scale}


def assert_same(states, expected):
    assert states.keys() == expected.keys()
    for name in states:
        assert torch.equal(states[name], expected[name]), name


@EVERY
def test_replayed_steps_train_as_eager_ones_bit_for_bit(tmp_path, task, amp):
    expected = train(make_trainer(tmp_path, task, amp=amp))
    trainer = make_trainer(tmp_path, task, amp=amp)
    calls = graphed(trainer)
    assert_same(train(trainer), expected)
    stage = ["warm up", "capture", "replay"]
    # Steps 0 to 3 belong to the first stage, 4 to 7 to the next, 8 to 11 to the last.
    assert calls == 3 * [*stage, "replay", "replay"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train_prompts": 9},
        {"recompute": True},
        {"injection": "mul"},
        {"n_layer": 2},
        pytest.param({"backend": "cpu"}, marks=needs_engine),
        {"model": "tied", "injection": "none", "n_loops": 2, "curriculum": CurriculumConfig()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_step_can_be_replayed(tmp_path, changes):
    expected = train(make_trainer(tmp_path, **changes))
    trainer = make_trainer(tmp_path, **changes)
    calls = graphed(trainer)
    assert_same(train(trainer), expected)
    assert "replay" in calls


def test_a_skipped_step_of_fp16_is_skipped_in_a_replay(tmp_path):
    """The loss scale falls and the weights stay, without a read on the host."""

    def run(trainer):
        train(trainer, 3)
        trainer.scaler.update(2.0**120)  # the next steps overflow
        return train(trainer, 4)

    changes = {"amp": "fp16", "curriculum": DIMS_ALONE}
    expected = run(make_trainer(tmp_path, **changes))
    trainer = make_trainer(tmp_path, **changes)
    graphed(trainer)
    assert_same(run(trainer), expected)
    assert trainer.scaler.get_scale() == 2.0**116


@EVERY
def test_steps_of_a_stage_allocate_the_same_and_read_only_what_lasts(tmp_path, task, amp):
    trainer = make_trainer(tmp_path, task, amp=amp, curriculum=DIMS_ALONE)
    train(trainer, 1)
    recorders = []
    for _ in range(6):
        trainer._set_inputs()
        recorders.append(Recorder())
        with recorders[-1]:  # raises where a value is read on the host
            trainer._update(5, 3)
        trainer.step += 1
    shapes = [recorder.shapes() for recorder in recorders]
    assert all(s == shapes[0] for s in shapes)
    moments = trainer.optimizer.state.values()
    lasting = [
        *trainer.model.parameters(), *(t for state in moments for t in state.values()),
        trainer._lr, trainer._n_dims, trainer._rows, trainer._sums,
    ]  # fmt: skip
    if amp == "fp16":
        lasting += [trainer.scaler._scale, trainer.scaler._growth_tracker]
    memory = {t.untyped_storage().data_ptr() for t in lasting}
    for tensor in recorders[-1].from_outside():
        assert tensor.untyped_storage().data_ptr() in memory


def test_values_of_a_step_are_set_before_its_replay(tmp_path):
    seen = []

    class Watching(FakeGraph):
        def replay(self):
            lr, n_dims = trainer._lr.item(), trainer._n_dims.item()
            seen.append((trainer.step, lr, n_dims, trainer._generator.initial_seed()))
            super().replay()

    trainer = make_trainer(tmp_path, curriculum=DIMS_ALONE)
    graphed(trainer, Watching)
    train(trainer, 8)
    expected = [(step, trainer.learning_rate(step)) for step in range(1, 8)]
    assert [(step, lr) for step, lr, _, _ in seen] == expected
    assert [n_dims for _, _, n_dims, _ in seen] == [2, 2, 3, 3, 3, 4, 4]
    assert len({seed for *_, seed in seen}) == 7


def test_training_continues_exactly_after_a_failed_capture(tmp_path):
    class Failing(FakeGraph):
        def capture(self, work):
            trainer._loss(5, 3)[0].backward()  # half a step, which also marks the scaler
            trainer.scaler.unscale_(trainer.optimizer)
            raise RuntimeError("operation not permitted when stream is capturing")

    changes = {"amp": "fp16", "curriculum": DIMS_ALONE}
    expected = train(make_trainer(tmp_path, **changes))
    trainer = make_trainer(tmp_path, **changes)
    graphed(trainer, Failing)
    with pytest.warns(UserWarning, match="CUDA graphs are off from here on: a capture failed"):
        states = train(trainer)
    assert_same(states, expected)


def test_a_stage_without_memory_takes_that_of_the_others_and_trains_exactly(tmp_path):
    class OutOfMemory(FakeGraph):
        def capture(self, work):
            if self.calls.count("replay") == 3 and "out of memory" not in self.calls:
                self.calls.append("out of memory")
                trainer._loss(5, 2)[0].backward()  # gradients that a second attempt must not add to
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().capture(work)

    expected = train(make_trainer(tmp_path, amp="fp16"))
    trainer = make_trainer(tmp_path, amp="fp16")
    calls = graphed(trainer, OutOfMemory)
    assert_same(train(trainer), expected)
    assert calls[5:8] == ["warm up", "out of memory", "capture"]
    assert trainer.graphs.unsupported is None


def test_a_run_resumed_from_the_other_kind_of_step_is_the_same(tmp_path):
    from looped_fast.training import checkpoint

    expected = train(make_trainer(tmp_path / "a"))
    first = make_trainer(tmp_path)
    train(first, 6)
    first.save()
    saved = checkpoint.load(checkpoint.latest(tmp_path))
    second = Trainer(first.config, tmp_path, saved)
    graphed(second)
    states = train(second, 6)
    del states["sums"], expected["sums"]
    assert_same(states, expected)
    assert isinstance(saved.optimizer_state["param_groups"][0]["lr"], float)


def test_settings_of_the_optimizer_are_those_of_this_run(tmp_path):
    """Settings in a checkpoint, perhaps of another device, are replaced."""
    from looped_fast.training import checkpoint

    first = make_trainer(tmp_path)
    train(first, 2)
    first.save()
    config = dataclasses.replace(first.config, beta2=0.5)
    second = Trainer(config, tmp_path, checkpoint.load(checkpoint.latest(tmp_path)))
    (group,) = second.optimizer.param_groups
    assert group["lr"] is second._lr
    assert group["betas"] == (0.9, 0.5)


@needs_triton
def test_steps_of_the_triton_backend_can_be_replayed(tmp_path):
    changes = {
        "backend": "triton", "amp": "bf16", "n_embd": 64, "n_head": 4, "batch_size": 1,
        "n_points": 2, "n_loops": 1, "window": 1, "curriculum": DIMS_ALONE,
    }  # fmt: skip
    expected = train(make_trainer(tmp_path, **changes), 3)
    trainer = make_trainer(tmp_path, **changes)
    calls = graphed(trainer)
    assert_same(train(trainer, 3), expected)
    assert calls == ["warm up", "capture", "replay", "replay"]
