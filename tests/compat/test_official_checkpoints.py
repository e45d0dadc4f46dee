"""Official ``.pt`` files that are valid in form and wrong in content: file and entry are named."""

from __future__ import annotations

import os
import re
import time
import zipfile

import pytest
import torch
from test_compat import conf

from looped_fast import compat
from looped_fast.errors import CheckpointError


@pytest.fixture(scope="module")
def content():
    """What an official ``state.pt`` holds."""
    model = compat.build_model(conf())
    optimizer = torch.optim.Adam(model.parameters())
    torch.stack(model(torch.randn(2, 4, 5), torch.randn(2, 4), 0, 2)).sum().backward()
    optimizer.step()
    return {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "train_step": 7,
    }


def changed(value, path, new):
    """A copy of nested dicts with ``new`` at ``path``."""
    if not path:
        return new
    return {**value, path[0]: changed(value.get(path[0], {}), path[1:], new)}


WEIGHT = ("model_state_dict", "_read_in.weight")
ADAM = ("optimizer_state_dict",)
FIRST = (*ADAM, "state", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_state_dict", 3), torch.zeros(2), "model_state_dict holds the name 3, and text"),
        (("model_state_dict", None), torch.zeros(2), "model_state_dict holds the name None"),
        (WEIGHT, [1.0], "model_state_dict['_read_in.weight'] holds [1.0]"),
        (WEIGHT, torch.zeros(2, dtype=torch.int64), "holds int64 [2], and a dense floating"),
        (WEIGHT, torch.zeros(2, 2).to_sparse(), "float32 [2, 2], and a dense floating-point"),
        (WEIGHT, torch.tensor([torch.nan, 0.0]), "1 of 2 numbers NaN or Inf"),
        (WEIGHT, torch.tensor([torch.inf, 0.0]), "1 of 2 numbers NaN or Inf"),
        (("model_state_dict", "_orig_mod._read_in.bias"), torch.zeros(64), "names twice"),
        (("train_step",), "7", "train_step holds '7'"),
        (("train_step",), -1, "train_step holds -1"),
        (("train_step",), 7.5, "train_step holds 7.5"),
        (("train_step",), True, "train_step holds True"),
        (("train_step",), None, None),
        (("train_step",), torch.tensor(7), "train_step holds int64 []"),
        (("train_step",), 10**600, "train_step holds a number of 1994 bits"),
        (ADAM, [1], "optimizer_state_dict holds [1], and a dict"),
        (ADAM, {}, "optimizer_state_dict.state holds None"),
        ((*ADAM, "param_groups"), {}, "optimizer_state_dict.param_groups holds {}"),
        ((*ADAM, "state"), {0: {}}, "the indices [0]"),
        ((*ADAM, "state", "x"), {}, "the indices [0, 1,"),
        ((*ADAM, "state", 999), {}, "the indices [0, 1,"),
        (FIRST, 3, "optimizer_state_dict.state[0] holds 3"),
        ((*FIRST, "more"), 3, "optimizer_state_dict.state[0] holds {"),
        (
            (*FIRST, "exp_avg"),
            torch.zeros(3),
            "state[0].exp_avg holds float32 [3], and float32 [64",
        ),
        (
            (*FIRST, "exp_avg"),
            torch.zeros(64, 5).double(),
            "state[0].exp_avg holds float64 [64, 5]",
        ),
        ((*FIRST, "exp_avg_sq"), torch.full((64, 5), torch.nan), "320 of 320 numbers NaN"),
        ((*FIRST, "exp_avg_sq"), torch.full((64, 5), -1.0), "exp_avg_sq holds negative numbers"),
        ((*FIRST, "step"), torch.tensor(torch.nan), "state[0].step holds nan"),
        ((*FIRST, "step"), torch.zeros(2), "state[0].step holds float32 [2]"),
        ((*FIRST, "step"), "1", "state[0].step holds '1'"),
        ((*FIRST, "step"), 3, None),  # as PyTorch before 1.12 wrote it
        ((*ADAM, "state"), {}, None),  # before the first update
    ],
    ids=lambda value: "",  # the longest number can't be printed
)
def test_each_entry_is_checked_and_named(tmp_path, content, path, value, message):
    file = tmp_path / "state.pt"
    torch.save(changed(content, path, value), file)
    if message is None:
        compat.load_official_checkpoint(file)
        return
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        compat.load_official_checkpoint(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_an_optimizer_of_another_model_is_refused_before_training(tmp_path, capsys, content):
    from looped_fast.train import main

    other = compat.build_model(conf(n_layer=2))
    file, out = tmp_path / "state.pt", tmp_path / "run"
    torch.save({**content, "model_state_dict": other.state_dict()}, file)
    assert main(["--preset", "tiny", "--init-from", str(file), "--out", str(out)]) == 1
    assert f"{file}: optimizer_state_dict.state holds the indices" in capsys.readouterr().err
    assert not out.exists()


def repacked(source, target, change, compression=zipfile.ZIP_STORED):
    """Copy a file of torch.save with the content of each of its records changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_cut_pickle_is_corrupt(tmp_path, content, keep):
    torch.save(content, tmp_path / "whole.pt")
    file = tmp_path / "state.pt"

    def cut(name, record):
        return record[: int(keep * len(record))] if name.endswith("data.pkl") else record

    repacked(tmp_path / "whole.pt", file, cut)
    with pytest.raises(CheckpointError, match=r"state\.pt (is corrupt|was refused)"):
        compat.load_official_checkpoint(file)


def test_changed_bytes_of_a_pickle_end_in_one_kind_of_error(tmp_path, content):
    torch.save(content, tmp_path / "whole.pt")
    file, refused = tmp_path / "state.pt", 0
    for position in range(0, 1500, 23):

        def flip(name, record, position=position):
            if not name.endswith("data.pkl"):
                return record
            return record[:position] + bytes([record[position] ^ 0x55]) + record[position + 1 :]

        repacked(tmp_path / "whole.pt", file, flip)
        try:
            compat.load_official_checkpoint(file)
        except CheckpointError as error:
            assert str(file) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 30


def test_a_cut_tensor_is_corrupt(tmp_path, content):
    torch.save(content, tmp_path / "whole.pt")
    file = tmp_path / "state.pt"
    repacked(tmp_path / "whole.pt", file, lambda n, r: r[: len(r) // 2] if "/data/" in n else r)
    with pytest.raises(CheckpointError, match=r"state\.pt is corrupt"):
        compat.load_official_checkpoint(file)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path, content):
    file = tmp_path / "state.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2 * 10**8))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"data\.pkl is compressed"):
        compat.load_official_checkpoint(file)
    assert time.perf_counter() - started < 0.1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")
def test_a_fifo_and_a_device_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "state.pt")
    (tmp_path / "model_1.pt").symlink_to("/dev/zero")
    for name in ("state.pt", "model_1.pt"):
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            compat.load_official_checkpoint(tmp_path / name)


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_sizes_are_read_from_matrices_only(content, shape):
    state = {**content["model_state_dict"], "_read_in.weight": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"no matrix '_read_in\.weight'"):
        compat.model_config_from_state_dict(state, 4, n_loops=2, window=1, injection="add")
