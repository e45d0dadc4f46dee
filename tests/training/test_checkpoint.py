from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from looped_fast import LoopedTransformer, ModelConfig
from looped_fast.training import checkpoint
from looped_fast.training.checkpoint import CheckpointError

CONFIG = ModelConfig(n_dims=3, n_positions=4, n_embd=8, n_head=2, n_loops=3, window=2)


def start(config=CONFIG, seed=0, **adam):
    torch.manual_seed(seed)
    model = LoopedTransformer(config)
    return model, torch.optim.Adam(model.parameters(), lr=0.1 / 3, **adam)


def train(model, optimizer, n_steps):
    for _ in range(n_steps):
        xs, ys = torch.randn(2, 4, 3), torch.randn(2, 4)  # from torch's generator
        (model(xs, ys) - ys).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run_dir, step, model, optimizer, **settings):
    return checkpoint.save(run_dir, step, model, optimizer, config=CONFIG.to_dict(), **settings)


def saved_run(run_dir):
    """Make a run with checkpoints of steps 900 and 1000."""
    model, optimizer = train(*start(), 1)
    for step in (900, 1000):
        save(run_dir, step, model, optimizer)
    return run_dir


def fill(model, value):
    """Set all weights of a model to one value, here the step that it is saved at."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def names(run_dir):
    return sorted(os.listdir(run_dir / "checkpoints"))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


# ---- saving and resuming


@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_resumed_training_is_bit_identical(tmp_path, adam):
    save(tmp_path, 3, *train(*start(**adam), 3))
    straight, _ = train(*start(**adam), 7)

    model, optimizer = start(seed=1, **adam)
    optimizer.param_groups[0]["lr"] = 0.5  # the checkpoint has the right one
    saved = checkpoint.load(checkpoint.latest(tmp_path))
    for _ in range(2):  # the first must not have changed what the second restores
        checkpoint.restore_into(saved, model, optimizer)
        train(model, optimizer, 4)
        assert_same(model.state_dict(), straight.state_dict())


def test_everything_comes_back_exactly(tmp_path):
    model, optimizer = train(*start(), 2)
    with torch.no_grad():  # bits that arithmetic would lose
        model._read_in.bias[:4] = torch.tensor([-0.0, float("inf"), 1e-45, 0.1])
    rng = torch.get_rng_state()
    meta = {"curriculum": {"n_loops": 3}, "best": 0.1}
    path = save(tmp_path, 2, model, optimizer, meta=meta)
    assert path == tmp_path / "checkpoints" / "step-00000002"
    saved = checkpoint.load(path)
    assert (saved.path, saved.step, saved.meta) == (path, 2, meta)
    assert ModelConfig.from_dict(saved.config) == CONFIG
    bits = {name: t.view(torch.int32) for name, t in model.state_dict().items()}
    assert_same({name: t.view(torch.int32) for name, t in saved.model_state.items()}, bits)
    assert torch.equal(saved.rng_state["cpu"], rng)
    assert saved.scaler_state == {}
    expected = optimizer.state_dict()
    assert saved.optimizer_state["param_groups"] == expected["param_groups"]
    assert saved.optimizer_state["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        assert_same(saved.optimizer_state["state"][i], state)


def test_files_are_plain_safetensors_and_json(tmp_path):
    model, optimizer = train(*start(), 1)
    path = save(tmp_path, 1, model, optimizer)
    assert sorted(os.listdir(path)) == [
        "checkpoint.json",
        "model.safetensors",
        "trainer.safetensors",
    ]
    assert_same(load_file(path / "model.safetensors"), dict(model.state_dict()))
    keys = load_file(path / "trainer.safetensors").keys()
    parameters = dict(model.named_parameters())
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert keys == {f"{kind}/{name}" for kind in kinds for name in parameters} | {"rng/cpu"}
    index = json.loads((path / "checkpoint.json").read_text())
    assert index["format_version"] == 1
    assert index["torch_version"] == torch.__version__


def test_gradient_scaler_comes_back(tmp_path):
    model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    path = save(tmp_path, 0, model, optimizer, scaler=scaler)
    other = torch.amp.GradScaler("cpu")
    checkpoint.restore_into(checkpoint.load(path), model, optimizer, other)
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 8.0


def test_cuda_generator_comes_back_where_cuda_is_in_use(tmp_path, monkeypatch):
    model, optimizer = start()
    state, restored = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    saved = checkpoint.load(save(tmp_path, 0, model, optimizer))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint.restore_into(saved, model, optimizer)
    assert restored == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    checkpoint.restore_into(saved, model, optimizer)
    assert torch.equal(restored[0], state)


def test_restoring_the_model_alone_leaves_the_generator(tmp_path):
    model, optimizer = train(*start(), 1)
    path = save(tmp_path, 1, model, optimizer)
    other, _ = start(seed=1)
    rng = torch.get_rng_state()
    checkpoint.restore_into(checkpoint.load(path), other)
    assert_same(other.state_dict(), model.state_dict())
    assert torch.equal(torch.get_rng_state(), rng)


def test_last_ones_are_kept(tmp_path):
    model, optimizer = start()
    assert checkpoint.latest(tmp_path) is None
    for step in (0, 100, 200, 300):
        save(tmp_path, step, model, optimizer, keep=2)
    assert names(tmp_path) == ["step-00000200", "step-00000300"]
    assert checkpoint.latest(tmp_path).name == "step-00000300"
    with pytest.raises(ValueError, match="keep = 0"):
        save(tmp_path, 400, model, optimizer, keep=0)


def test_steps_are_ordered_as_numbers(tmp_path):
    model, optimizer = start()
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, model, optimizer)
    assert checkpoint.latest(tmp_path).name == "step-100000000"


def test_same_step_is_replaced(tmp_path):
    model, optimizer = start()
    for value in (1.0, 2.0):
        fill(model, value)
        path = save(tmp_path, 5, model, optimizer)
    assert checkpoint.load(path).model_state["_read_in.bias"][0] == 2.0
    assert names(tmp_path) == ["step-00000005"]


def test_rewound_run_drops_its_abandoned_future(tmp_path):
    model, optimizer = start()
    for step in (100, 200, 300, 150):
        save(tmp_path, step, model, optimizer, keep=2)
    assert names(tmp_path) == ["step-00000150"]  # 200 and 300 are of the abandoned run


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    model, optimizer = start()
    save(tmp_path, 1, model, optimizer)
    (tmp_path / "checkpoints" / ".tmp-step-00000002").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-00000002" / "model.safetensors").write_bytes(b"x")
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    save(tmp_path, 3, model, optimizer)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


# ---- kills


class Killed(BaseException):
    """Simulates a kill: no handler for errors catches it."""


@pytest.mark.parametrize("next_step", [1, 2])  # replacing the only one, and adding one
def test_a_kill_at_any_system_call_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, next_step):
    model, optimizer = start()
    calls = {(os, "fsync"), (os, "rename"), (os, "open"), (shutil, "rmtree")}
    real = {(module, name): getattr(module, name) for module, name in calls}
    survived = set()
    for fatal in range(1000):
        run_dir = tmp_path / str(fatal)
        fill(model, 1.0)
        save(run_dir, 1, model, optimizer, keep=1)
        fill(model, 2.0)
        count = 0

        def dying(module, name, fatal=fatal):
            def call(*args, **kwargs):
                nonlocal count
                if count == fatal:
                    if name == "rmtree":  # dies half-way
                        os.remove(os.path.join(args[0], "model.safetensors"))
                    raise Killed
                count += 1
                return real[module, name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in calls:
                patch.setattr(module, name, dying(module, name))
            try:
                save(run_dir, next_step, model, optimizer, keep=1)
                killed = False
            except Killed:
                killed = True
        # All visible checkpoints load, there always is one, and the newest mixes no two steps.
        saved = [checkpoint.load(path) for path in checkpoint.checkpoints(run_dir)]
        values = {t.unique().item() for t in saved[-1].model_state.values()}
        assert values in ({1.0}, {2.0})
        survived |= values
        path = save(run_dir, next_step, model, optimizer, keep=1)  # the next attempt succeeds
        assert names(run_dir) == [path.name]
        if not killed:
            break
    assert values == {2.0}
    assert survived == {1.0, 2.0}
    assert fatal >= 9  # 3 files, 2 directories, 2 or 3 renames, a removal: all were tried


def save_for_ever(run_dir, finished):
    torch.set_num_threads(1)
    model, optimizer = train(*start(), 1)
    for step in range(1, 1_000_000):
        for _ in range(2):  # the second replaces the first
            fill(model, float(step))
            save(run_dir, step, model, optimizer, keep=2)
        finished.value = step


def test_sigkill_during_writing_leaves_a_loadable_latest(tmp_path):
    context = multiprocessing.get_context("forkserver")
    # Making an Adam imports the second of these, which takes more than a second.
    context.set_forkserver_preload(["looped_fast.training.checkpoint", "torch._dynamo"])
    for trial in range(8):
        run_dir, finished = tmp_path / str(trial), context.Value("i", 0)
        writer = context.Process(target=save_for_ever, args=(run_dir, finished))
        writer.start()
        deadline = time.monotonic() + 60
        while finished.value < 2:
            assert writer.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        writer.kill()
        writer.join()
        saved = checkpoint.load(checkpoint.latest(run_dir))
        assert saved.step >= finished.value
        assert {t.unique().item() for t in saved.model_state.values()} == {float(saved.step)}
        model, optimizer = start()
        checkpoint.restore_into(saved, model, optimizer)
        save(run_dir, saved.step + 1, model, optimizer, keep=1)
        assert names(run_dir) == [f"step-{saved.step + 1:08d}"]


# ---- folders that can't be written


@pytest.fixture
def run(tmp_path):
    return saved_run(tmp_path)


def failing(code):
    def call(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_earlier_checkpoints(run, monkeypatch, call):
    model, optimizer = start()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(CheckpointError) as caught:
            save(run, 1100, model, optimizer)
    message = str(caught.value)
    target = run / "checkpoints" / "step-00001100"
    assert f"can't write {target}" in message
    assert "No space left" in message
    assert "MB are free" in message
    assert f"The last good checkpoint is {checkpoint.latest(run)}" in message
    assert names(run) == ["step-00000900", "step-00001000"]
    assert checkpoint.load(checkpoint.latest(run)).step == 1000
    save(run, 1100, model, optimizer)  # with space again


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    model, optimizer = start()
    monkeypatch.setattr("pathlib.Path.mkdir", failing(errno.EACCES))  # root may write anywhere
    with pytest.raises(CheckpointError, match=r"can't write .*Permission denied.*you may write"):
        save(tmp_path / "run", 1, model, optimizer)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"can't write .*run/checkpoints"):
        save(tmp_path / "run", 1, *start())
