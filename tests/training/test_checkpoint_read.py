"""Damaged checkpoints: each error names file and entry, and an intact older checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import saved_run

from looped_fast import pretrained
from looped_fast.training import checkpoint, checkpoint_read
from looped_fast.training.checkpoint import CheckpointError


@pytest.fixture
def run(tmp_path):
    return saved_run(tmp_path)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def index_with(**changes):
    """Change entries of the index, or remove them with None, and leave its hash."""

    def change(file):
        index = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))

    return change


def sealed_index_with(**changes):
    """As ``index_with``, with the hash redone, as a program that knows the format would."""

    def change(file):
        index_with(**changes)(file)
        file.write_text(json.dumps(checkpoint_read.sealed(json.loads(file.read_text()))))

    return change


def write_with_its_hash(file, content):
    """Replace a safetensors file, and redo size and hash in the index."""
    file.write_bytes(content)
    index = file.with_name(checkpoint.INDEX)
    files = json.loads(index.read_text())["files"]
    files[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sealed_index_with(files=files)(index)


DAMAGES = [
    ("model.safetensors", truncate, "truncated"),
    ("trainer.safetensors", truncate, "truncated"),
    ("model.safetensors", flip_a_bit, "is corrupt: its sha256"),
    ("trainer.safetensors", flip_a_bit, "is corrupt: its sha256"),
    ("model.safetensors", os.remove, "No such file"),
    ("checkpoint.json", os.remove, "No such file"),
    ("checkpoint.json", truncate, "is not JSON"),
    ("checkpoint.json", lambda file: file.write_bytes(b"\xff\xfe\x80"), "is not JSON"),
    ("checkpoint.json", lambda file: file.write_text("[" * 100_000), "nested too deep"),
    ("checkpoint.json", lambda file: file.write_text("9" * 5000), "is not JSON"),
    ("checkpoint.json", lambda file: file.write_text("[]"), "holds a JSON list"),
    ("checkpoint.json", index_with(format_version=None), "no checkpoint of looped_fast"),
    ("checkpoint.json", index_with(step=None), "is corrupt: its sha256"),
    ("checkpoint.json", index_with(step=1001), "is corrupt: its sha256"),
    ("checkpoint.json", index_with(sha256="0" * 64), "is corrupt: its sha256"),
    ("checkpoint.json", index_with(sha256=5), "is corrupt: its sha256"),
    ("checkpoint.json", index_with(format_version=2), "install a newer looped_fast"),
]


@pytest.mark.parametrize(("file", "damage", "fault"), DAMAGES)
def test_damage_is_named_with_an_intact_older_checkpoint(run, file, damage, fault):
    path = checkpoint.latest(run)
    damage(path / file)
    assert_refused(run, path / file, fault)


def assert_refused(run, file, *faults):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(file.parent)
    message = str(caught.value)
    for fault in (str(file), *faults):
        assert fault in message
    older = run / "checkpoints" / "step-00000900"
    assert message.endswith(f"An intact older one is {older}")
    assert checkpoint.load(older).step == 900


GROUP = {"betas": [0.9, 0.999], "params": [0]}
ENTRIES = [
    ({"step": None}, "lacks the entry step"),
    ({"step": "20"}, "step = '20': a whole number is needed"),
    ({"step": True}, "step = True: a whole number is needed"),
    ({"step": float("nan")}, "step = nan: a whole number is needed"),
    ({"step": 1e30}, "step = 1e+30: a whole number is needed"),
    ({"step": -7}, "step = -7: a number from 0 to 2^63 - 1 is needed"),
    ({"step": 10**30}, "a number from 0 to 2^63 - 1 is needed"),
    ({"format_version": "1"}, "format_version = '1': a whole number is needed"),
    ({"format_version": True}, "format_version = True: a whole number is needed"),
    ({"format_version": 0}, "format_version = 0: a number from 1"),
    ({"config": True}, "config = True: a mapping is needed"),
    ({"config": []}, "config = []: a mapping is needed"),
    ({"meta": []}, "meta = []: a mapping is needed"),
    ({"meta": "none"}, "meta = 'none': a mapping is needed"),
    ({"note": 1}, "an unknown entry 'note'"),
    ({"files": []}, "files = []: a mapping is needed"),
    ({"files": {}}, "lacks the entry files.model.safetensors"),
    ({"files": {"model.safetensors": {}}}, "lacks the entry files.trainer.safetensors"),
    ({"files": {"model.safetensors": 5}}, "files.model.safetensors = 5: a mapping is needed"),
    ({"files": {"model.safetensors": {}, "trainer.safetensors": {}}}, "model.safetensors.bytes"),
    ({"scaler": None}, "lacks the entry scaler"),
    ({"scaler": 1.0}, "scaler = 1.0: a mapping is needed"),
    ({"param_names": None}, "lacks the entry param_names"),
    ({"param_names": ["weight"]}, "param_names[0] = 'weight': a list is needed"),
    ({"param_names": [[5]]}, "param_names[0] = 5: a text is needed"),
    ({"param_names": []}, "has 1 param_groups and 0 param_names"),
    ({"param_groups": {}}, "param_groups = {}: a list is needed"),
    ({"param_groups": [5]}, "param_groups[0] = 5: a mapping is needed"),
    ({"param_groups": [{"params": []}]}, "lacks the entry param_groups[0].betas"),
    ({"param_groups": [GROUP]}, "param_groups[0].params = [0]: the positions of the"),
    ({"param_groups": [GROUP], "param_names": [["a", "a"]]}, "the positions of the 2 names"),
    (
        {"param_groups": [{**GROUP, "params": [0, 1]}], "param_names": [["a", "a"]]},
        "names a parameter twice",
    ),
]


@pytest.mark.parametrize(("changes", "fault"), ENTRIES)
def test_an_entry_of_another_type_or_range_is_named(run, changes, fault):
    index = checkpoint.latest(run) / checkpoint.INDEX
    sealed_index_with(**changes)(index)
    assert_refused(run, index, fault)


def test_every_flipped_bit_of_an_index_is_found(run):
    index = checkpoint.latest(run) / checkpoint.INDEX
    content, chance = index.read_bytes(), random.Random(0)
    before = json.loads(content)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        index.write_bytes(damaged)
        loaded = loaded_or_message(index.parent)
        if isinstance(loaded, str):
            assert str(index) in loaded
        else:  # a space between two values that became another
            assert json.loads(damaged) == before
            assert loaded.step == 1000


def loaded_or_message(folder):
    try:
        return checkpoint.load(folder)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("depth", [5, 100, *range(900, 1000, 7), 100_000])
def test_an_index_nested_deep_loads_or_is_named(run, depth):
    index = checkpoint.latest(run) / checkpoint.INDEX
    index_with(sha256=None, meta="nested")(index)
    index.write_text(index.read_text().replace('"nested"', '{"a": ' * depth + "1" + "}" * depth))
    loaded = loaded_or_message(index.parent)
    if isinstance(loaded, str):
        assert depth >= 900
        assert str(index) in loaded
        assert "is nested too deep" in loaded
    else:
        assert depth < 100_000  # Python 3.12 and later reads some thousands
        assert loaded.meta["a"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\xff" * 8,
        b"\x08" + bytes(7) + b"[1, 2,3]",
        b"\x0a" + bytes(7) + b'{"a": "b"}',
        b"\x36" + bytes(7) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}' + bytes(4),
        b"\x35" + bytes(7) + b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}' + bytes(4),
    ],
    ids=["empty", "garbage", "huge-header", "list", "text", "shape", "dtype"],
)
def test_a_file_that_is_no_safetensors_is_named(run, name, content):
    file = checkpoint.latest(run) / name
    write_with_its_hash(file, content)
    assert_refused(run, file, "is no safetensors file (")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rng/cpu": None}, "lacks rng/cpu"),
        ({"rng/tpu": torch.zeros(4)}, "holds 'rng/tpu', which is of no parameter"),
        ({"exp_avg/nothing": torch.zeros(4)}, "holds 'exp_avg/nothing', which is of no parameter"),
        ({"nothing": torch.zeros(4)}, "holds 'nothing', which is of no parameter"),
    ],
)
def test_a_tensor_without_a_parameter_is_named(run, changes, fault):
    file = checkpoint.latest(run) / checkpoint.TRAINER
    tensors = {k: v for k, v in {**load_file(file), **changes}.items() if v is not None}
    save_file(tensors, file)
    write_with_its_hash(file, file.read_bytes())
    assert_refused(run, file, fault)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "checkpoint.json"])
def test_a_pipe_or_a_device_in_place_of_a_file_does_not_hang(run, name):
    file = checkpoint.latest(run) / name
    file.unlink()
    os.mkfifo(file)
    assert_refused(run, file, "is a FIFO, socket or device")
    file.unlink()
    file.symlink_to("/dev/zero")
    assert_refused(run, file, "is a FIFO, socket or device")


def test_a_checkpoint_whose_index_has_no_hash_still_loads(run):
    path = checkpoint.latest(run)
    index_with(sha256=None)(path / checkpoint.INDEX)
    assert checkpoint.load(path).step == 1000
    shipped = json.loads((pretrained.path("lr-small") / checkpoint.INDEX).read_text())
    assert "sha256" not in shipped


def test_a_damaged_older_checkpoint_is_not_recommended(run):
    for path in checkpoint.checkpoints(run):
        truncate(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no intact older one"):
        checkpoint.load(checkpoint.latest(run))


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-00000007.*name a directory like"):
        checkpoint.load(tmp_path / "checkpoints" / "step-00000007")
