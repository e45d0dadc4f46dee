"""Checkpoints whose content does not fit the model or the settings; nothing of them is used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import CONFIG, assert_same, save, saved_run, start, train
from test_checkpoint_read import sealed_index_with, write_with_its_hash

import looped_fast
from looped_fast import pretrained
from looped_fast.training import checkpoint
from looped_fast.training.checkpoint import CheckpointError


@pytest.fixture
def run(tmp_path):
    return saved_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        (
            {"n_dims": 7},
            ["_read_in.weight is float32 [8, 3] in the checkpoint, float32 [8, 7] in the model"],
        ),
        ({"n_layer": 2}, ["h.1.ln_1.weight is missing", "h.1.ln_1.bias is missing", "9 more"]),
        ({"n_embd": 16}, ["[16, 3] in the model", "more"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(run, changes, faults):
    saved = checkpoint.load(checkpoint.latest(run))
    model, optimizer = start(replace(CONFIG, **changes))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="is of another model") as caught:
        checkpoint.restore_into(saved, model, optimizer)
    for fault in (*faults, "model.safetensors", "checkpoint.json"):
        assert fault in str(caught.value)
    assert_same(model.state_dict(), before)


def test_unexpected_parameters_and_other_dtypes_are_refused(run):
    saved = checkpoint.load(checkpoint.latest(run))
    model, _ = start()
    extra = replace(saved, model_state={**saved.model_state, "extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match="extra is unexpected"):
        checkpoint.restore_into(extra, model)
    with pytest.raises(CheckpointError, match=r"float32 .* in the checkpoint, float64 "):
        checkpoint.restore_into(saved, model.double())


def test_an_optimizer_over_other_parameters_is_refused(run):
    saved = checkpoint.load(checkpoint.latest(run))
    model, _ = start()
    backwards = torch.optim.Adam(list(model.parameters())[::-1])
    with pytest.raises(CheckpointError, match=r"other parameters, or in another order"):
        checkpoint.restore_into(saved, model, backwards)


# ---- tensors


PARAMETER = "_read_in.bias"  # float32 [8]


def change_tensors(file, changes):
    """Change tensors of a file, or remove them with None; the hashes are redone."""
    tensors = {k: v for k, v in {**load_file(file), **changes}.items() if v is not None}
    save_file(tensors, file)
    write_with_its_hash(file, file.read_bytes())


def assert_refused(folder, file, fault, **scaler):
    """Resuming from ``folder`` names file and fault, and changes nothing."""
    model, optimizer = train(*start(seed=1), 1)
    before = [t.clone() for t in (*model.parameters(), *adam_tensors(optimizer))]
    rng = torch.get_rng_state()
    saved = checkpoint.load(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore_into(saved, model, optimizer, **scaler)
    assert str(folder / file) in str(caught.value)
    assert fault in str(caught.value)
    after = [*model.parameters(), *adam_tensors(optimizer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert not optimizer.param_groups[0]["amsgrad"]


def adam_tensors(optimizer):
    return [t for state in optimizer.state.values() for t in state.values()]


def with_one(value):
    tensor = torch.zeros(8)
    tensor[3] = value
    return tensor


@pytest.mark.parametrize(
    ("entry", "tensor", "fault"),
    [
        ("exp_avg", None, "lacks exp_avg/_read_in.bias"),
        ("step", None, "lacks step/_read_in.bias"),
        ("max_exp_avg_sq", torch.zeros(8), "holds max_exp_avg_sq/_read_in.bias, which Adam does"),
        ("exp_avg", torch.zeros(9), "exp_avg/_read_in.bias of float32 [9]: float32 [8] is needed"),
        ("exp_avg_sq", torch.zeros(8).double(), "of float64 [8]: float32 [8] is needed"),
        ("exp_avg", torch.zeros(8).bool(), "of bool [8]: float32 [8] is needed"),
        ("exp_avg", with_one(torch.nan), "exp_avg/_read_in.bias holds 1 of 8 numbers that are NaN"),
        ("exp_avg_sq", with_one(torch.inf), "exp_avg_sq/_read_in.bias holds 1 of 8 numbers"),
        ("exp_avg_sq", with_one(-1.0), "negative numbers in exp_avg_sq/_read_in.bias"),
        ("step", torch.tensor(-1.0), "step/_read_in.bias = -1.0: a count of steps is needed"),
        ("step", torch.tensor(torch.nan), "step/_read_in.bias = nan: a count of steps is needed"),
        ("step", torch.tensor(1.5), "step/_read_in.bias = 1.5: a count of steps is needed"),
        ("step", torch.tensor(1), "step/_read_in.bias of int64 []"),
        ("step", torch.tensor(1.0).to(torch.float8_e4m3fn), "step/_read_in.bias of float8_e4m3fn"),
        ("step", torch.ones(1), "step/_read_in.bias of float32 [1]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_optimizer_state_that_does_not_fit_is_named(run, entry, tensor, fault):
    path = checkpoint.latest(run)
    change_tensors(path / checkpoint.TRAINER, {f"{entry}/{PARAMETER}": tensor})
    assert_refused(path, checkpoint.TRAINER, fault)


def test_a_parameter_without_any_state_is_named_unless_it_is_unused(run):
    path = checkpoint.latest(run)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    change_tensors(path / checkpoint.TRAINER, {f"{kind}/{PARAMETER}": None for kind in kinds})
    assert_refused(path, checkpoint.TRAINER, "lacks step/_read_in.bias")
    model, optimizer = start(seed=1)
    checkpoint.restore_into(checkpoint.load(path), model, optimizer, unused=[PARAMETER])
    frozen, optimizer = start(seed=1)
    frozen._read_in.bias.requires_grad_(False)
    checkpoint.restore_into(checkpoint.load(path), frozen, optimizer)


def test_a_run_has_no_optimizer_state_only_before_its_first_step(tmp_path):
    for step in (0, 3):
        path = save(tmp_path, step, *start())
        model, optimizer = start(seed=1)
        if step == 0:
            checkpoint.restore_into(checkpoint.load(path), model, optimizer)
            assert optimizer.state_dict()["state"] == {}
        else:
            assert_refused(path, checkpoint.TRAINER, "lacks step/")


@pytest.mark.parametrize(
    ("entry", "tensor", "fault"),
    [
        ("cpu", torch.zeros(5056, dtype=torch.uint8), "rng/cpu that is no generator's state"),
        ("cpu", torch.zeros(16, dtype=torch.uint8), "rng/cpu that is no generator's state"),
        ("cpu", torch.zeros(5056), "rng/cpu that is no generator's state"),
        ("cuda", torch.zeros(17, dtype=torch.uint8), "rng/cuda that is no generator's state"),
        ("cuda", torch.zeros(16), "rng/cuda that is no generator's state"),
        ("cuda", torch.ones(16, dtype=torch.uint8), "rng/cuda that is no generator's state"),
    ],
    ids=["zeros", "short", "float", "long", "cuda-float", "offset"],
)
def test_a_generator_state_that_is_none_is_named(run, entry, tensor, fault):
    path = checkpoint.latest(run)
    change_tensors(path / checkpoint.TRAINER, {f"rng/{entry}": tensor})
    assert_refused(path, checkpoint.TRAINER, fault)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(run, number):
    path = checkpoint.latest(run)
    change_tensors(path / checkpoint.MODEL, {PARAMETER: with_one(number)})
    fault = "_read_in.bias holds 1 of 8 numbers that are NaN or Inf"
    assert_refused(path, checkpoint.MODEL, fault)
    with pytest.raises(CheckpointError, match=fault):
        checkpoint.restore_into(checkpoint.load(path), start()[0])


def test_shipped_weights_that_are_not_finite_are_named(tmp_path, monkeypatch):
    source = checkpoint.load(pretrained.path("lr-small"))
    state = {name: torch.full_like(t, torch.nan) for name, t in source.model_state.items()}
    checkpoint.export_weights(
        replace(source, model_state=state), tmp_path, config=source.config, meta={}
    )
    monkeypatch.setattr("looped_fast.pretrained.weights.path", lambda name: tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors: .* are NaN or Inf"):
        looped_fast.from_pretrained("lr-small")


# ---- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", None), ("lr", "0.1"), ("lr", True), ("lr", -1.0), ("lr", float("nan")),
        ("lr", float("inf")), ("eps", -1e-8), ("weight_decay", []), ("betas", [0.9, 1.0]),
        ("betas", [0.9, "x"]), ("betas", [0.9]), ("amsgrad", True), ("maximize", True),
        ("maximize", 1), ("fused", "yes"), ("foreach", 3),
    ],
)  # fmt: skip
def test_a_setting_that_adam_does_not_take_is_named(run, name, value):
    path = checkpoint.latest(run)
    (group,) = json.loads((path / checkpoint.INDEX).read_text())["param_groups"]
    sealed_index_with(param_groups=[{**group, name: value}])(path / checkpoint.INDEX)
    assert_refused(path, checkpoint.INDEX, f"param_groups[0].{name} = ")


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_a_setting_that_is_missing_is_named(run, name):
    path = checkpoint.latest(run)
    (group,) = json.loads((path / checkpoint.INDEX).read_text())["param_groups"]
    del group[name]
    sealed_index_with(param_groups=[group])(path / checkpoint.INDEX)
    assert_refused(path, checkpoint.INDEX, f"lacks the entry param_groups[0].{name}")


SCALER = torch.amp.GradScaler("cpu").state_dict()


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({**SCALER, "scale": -1.0}, "scaler.scale = -1.0: a number above 0 is needed"),
        ({**SCALER, "scale": float("nan")}, "scaler.scale = nan: a number above 0 is needed"),
        ({**SCALER, "scale": float("inf")}, "scaler.scale = inf"),
        ({**SCALER, "scale": "1"}, "scaler.scale = '1'"),
        ({**SCALER, "backoff_factor": 2.0}, "a number above 0 and below 1 is needed"),
        ({**SCALER, "growth_interval": 0}, "scaler.growth_interval = 0: a whole number above 0"),
        ({**SCALER, "_growth_tracker": True}, "scaler._growth_tracker = True"),
        ({"scale": 8.0}, "lacks the entry scaler.growth_factor"),
        ({**SCALER, "note": 1}, "has an unknown entry scaler.note"),
    ],
)
def test_a_loss_scale_out_of_range_is_named(run, state, fault):
    path = checkpoint.latest(run)
    sealed_index_with(scaler=state)(path / checkpoint.INDEX)
    assert_refused(path, checkpoint.INDEX, fault, scaler=torch.amp.GradScaler("cpu"))


def test_a_cuda_generator_that_is_dropped_is_said(run, caplog):
    path = checkpoint.latest(run)
    change_tensors(path / checkpoint.TRAINER, {"rng/cuda": torch.zeros(16, dtype=torch.uint8)})
    checkpoint.restore_into(checkpoint.load(path), start()[0])
    assert caplog.messages == []
    checkpoint.restore_into(checkpoint.load(path), *start())
    assert caplog.messages == [
        f"{path} was saved on a GPU; there is none here, so the state of its generator is dropped"
    ]


def test_an_optimizer_over_parameters_of_another_model_is_named(run):
    model, _ = start()
    _, other = start()
    with pytest.raises(ValueError, match=r"parameter of shape \[.*\] that is not the model's"):
        checkpoint.restore_into(checkpoint.load(checkpoint.latest(run)), model, other)
