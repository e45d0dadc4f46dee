"""Weights exported to share: a checkpoint without what training needs."""

from __future__ import annotations

import os

import pytest
from test_checkpoint import assert_same, save, start, train

from looped_fast.training import checkpoint
from looped_fast.training.checkpoint import CheckpointError


def exported(tmp_path):
    model, optimizer = train(*start(), 2)
    source = checkpoint.load(save(tmp_path / "run", 2, model, optimizer))
    checkpoint.export_weights(source, tmp_path / "out", config={"a": 1}, meta={"minutes": 3})
    return model, tmp_path / "out"


def test_exported_weights_load_without_what_training_needs(tmp_path):
    model, folder = exported(tmp_path)
    assert sorted(os.listdir(folder)) == ["checkpoint.json", "model.safetensors"]
    loaded = checkpoint.load(folder)
    assert (loaded.step, loaded.config, loaded.meta) == (2, {"a": 1}, {"minutes": 3})
    assert loaded.optimizer_state == loaded.rng_state == {}
    restored, _ = start(seed=1)
    checkpoint.restore_into(loaded, restored)
    assert_same(restored.state_dict(), model.state_dict())


def test_training_does_not_resume_from_exported_weights(tmp_path):
    _, folder = exported(tmp_path)
    model, optimizer = start(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"holds weights only.*--init-from"):
        checkpoint.restore_into(checkpoint.load(folder), model, optimizer)
    assert_same(model.state_dict(), before)
