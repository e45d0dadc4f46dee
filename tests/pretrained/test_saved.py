"""Folders of ``save_pretrained``: what is written is loaded, and what is damaged is refused."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from conftest import SMALL, prompt, small_model
from foreign_models import Lora
from safetensors.torch import load_file, save_file

import looped_fast
from looped_fast import LoopedTransformer, ModelConfig, accelerate, compat
from looped_fast.errors import CheckpointError
from looped_fast.pretrained import load_run
from looped_fast.training import checkpoint
from looped_fast.training.checkpoint_read import sealed
from looped_fast.training.config import TrainConfig

# Every field of ModelConfig takes another value than its default somewhere.
CONFIGS = {
    "looped": {},
    "classes": {"pred_type": "classification"},
    "product": {"injection": "mul", "n_loops": 7, "window": 7},
    "standard": {"injection": "none", "n_layer": 3, "n_loops": 1, "window": 1},
    "injected": {"injection": "every_block", "n_layer": 2},
    "sizes": {"n_dims": 5, "n_positions": 11, "n_embd": 24, "n_head": 3, "init_std": 0.5},
}


def assert_same(model, other):
    states = model.state_dict(), other.state_dict()
    assert all(a.dtype == b.dtype for a, b in zip(*map(dict.values, states), strict=True))
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_is_saved_is_loaded(changes, tmp_path):
    model = small_model(**changes)
    model.save_pretrained(tmp_path / "new" / "folder")
    state = torch.get_rng_state()
    loaded = looped_fast.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == model.config
    assert_same(loaded, model)
    xs_ys = prompt(d=model.config.n_dims)
    torch.testing.assert_close(loaded(*xs_ys), model(*xs_ys), rtol=0, atol=0)
    loaded.loss(*xs_ys).backward() if loaded.config.n_outputs == 1 else None
    assert all(p.requires_grad for p in loaded.parameters())


def test_every_field_of_a_configuration_is_tried():
    changed = {name for changes in CONFIGS.values() for name in changes}
    assert changed == set(SMALL.to_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype, tmp_path):
    model = small_model(dtype)
    model.save_pretrained(tmp_path)
    assert_same(looped_fast.from_pretrained(str(tmp_path)), model)


def test_the_files_are_safetensors_json_and_a_card(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "tiny")
    names = sorted(file.name for file in (tmp_path / "tiny").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    settings = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert settings == {
        "library_name": "looped_fast",
        "looped_fast_version": looped_fast.__version__,
        "format_version": 1,
        "model": model.config.to_dict(),
    }
    assert load_file(tmp_path / "tiny" / "model.safetensors").keys() == model.state_dict().keys()
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert 'from_pretrained("tiny")' in card
    assert "| `n_loops` | 4 |" in card


def test_folders_need_no_further_package(tmp_path, monkeypatch):
    for package in ("huggingface_hub", "transformers", "peft"):
        monkeypatch.setitem(sys.modules, package, None)
    model = small_model()
    model.save_pretrained(tmp_path)
    assert_same(looped_fast.from_pretrained(tmp_path), model)


def test_a_second_save_replaces_all_but_the_card(tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my own card")
    model = small_model(n_layer=2)
    model.save_pretrained(tmp_path)
    assert_same(looped_fast.from_pretrained(tmp_path), model)
    assert (tmp_path / "README.md").read_text() == "my own card"


def test_an_accelerated_model_and_one_of_the_official_kind_are_saved(tmp_path):
    model = accelerate(small_model(), precision="bf16")
    model.save_pretrained(tmp_path / "ours")
    assert_same(looped_fast.from_pretrained(tmp_path / "ours"), model)
    config = ModelConfig(**{**SMALL.to_dict(), "injection": "none"})
    tied = compat.TransformerModelTying(config)
    tied.save_pretrained(tmp_path / "tied")
    assert_same(looped_fast.from_pretrained(tmp_path / "tied"), tied)


def test_a_model_with_an_adapter_is_not_saved_as_one_without(tmp_path):
    model = small_model()
    mlp = model._backbone.transformer["h"][0].mlp
    mlp.c_fc = Lora(mlp.c_fc)
    with pytest.raises(ValueError, match=r"mlp\.c_fc\.weight, .* merge adapters into the model"):
        model.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't write .*file: .*; choose a folder that you"):
        small_model().save_pretrained(tmp_path / "file")


def test_a_save_that_is_cut_off_leaves_no_model(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path)
    monkeypatch.setattr("looped_fast.model.sharing.pack", lambda tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_model(n_layer=2).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        looped_fast.from_pretrained(tmp_path)


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def with_settings(**changes):
    def damage(folder):
        settings = {k: v for k, v in {**settings_of(folder), **changes}.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


def with_model(**changes):
    def damage(folder):
        settings = settings_of(folder)
        settings["model"] |= changes
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


def with_config(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


def with_content(content):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def with_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


BIAS = "_read_out.bias"
DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors can't be read"),
    "weights cut off": (cut, "is no safetensors file"),
    "no bytes": (with_content(b""), "is no safetensors file"),
    "a pickle": (with_content(b"\x80\x04}q\x00."), "is no safetensors file"),
    "a header of any length": (with_content(b"\xff" * 8 + b"{}"), "is no safetensors file"),
    "a tensor too few": (with_tensors(lambda t: t.pop(BIAS)), f"{BIAS} is missing"),
    "a tensor too many": (
        with_tensors(lambda t: t.update(code=torch.zeros(1))),
        "code is unexpected",
    ),
    "another shape": (
        with_tensors(lambda t: t.update({BIAS: torch.zeros(2)})),
        r"_read_out\.bias is float32 \[2\] in the checkpoint, float32 \[1\] in the model",
    ),
    "two dtypes": (
        with_tensors(lambda t: t.update({BIAS: torch.zeros(1).double()})),
        r"_read_out\.bias is float64 \[1\]",
    ),
    "whole numbers": (
        with_tensors(lambda t: t.update({k: v.int() for k, v in t.items()})),
        "is int32",
    ),
    "NaN": (with_tensors(lambda t: t[BIAS].fill_(torch.nan)), "1 of 1 numbers that are NaN"),
    "no JSON": (with_config(b"{"), "config.json is not JSON"),
    "not UTF-8": (with_config(b"\xff\xfe\x00"), "config.json is not JSON"),
    "no object": (with_config(b"[1]"), "holds a JSON list; an object is needed"),
    "no end of nesting": (with_config(b"[" * 10**5), "nested too deep"),
    "another library": (
        with_config(b'{"model_type": "gpt2", "n_layer": 12}'),
        r"is of no model of looped_fast; .*looped_fast\.accelerate\(model\)",
    ),
    "a later format": (with_settings(format_version=2), "has format version 2, .* a newer looped"),
    "no format": (with_settings(format_version=None), "lacks the entry format_version"),
    "format 0": (with_settings(format_version=0), "has format version 0, .* reads versions 1 to 1"),
    "format True": (with_settings(format_version=True), "format_version = True: a whole number"),
    "no settings": (with_settings(model=None), "lacks the entry model"),
    "settings of no kind": (with_settings(model=[1]), r"has model = \[1\]: a mapping is needed"),
    "an unknown entry": (with_settings(auto_map={"AutoModel": "code.Model"}), "entry 'auto_map'"),
    "an unknown setting": (with_model(n_layers=1), "setting 'n_layers'; did you mean 'n_layer'"),
    "a setting out of range": (with_model(n_head=7), "n_embd = 16 is not divisible by n_head = 7"),
    "a setting of no kind": (with_model(n_loops="4"), "n_loops = '4': a whole number"),
    "a window of no kind": (with_model(window="2"), "window = '2': a whole number"),
    "more layers than tensors": (with_model(n_layer=10**9), r"holds \d+ tensors, too few for n_"),
    "one more layer": (with_model(n_layer=2), r"h\.1\.ln_1\.weight is missing"),
    "any width": (
        with_model(n_embd=2 * 10**7),
        r"is of another model: .*, float32 \[20000000, 3\] in the m",
    ),
    "no width of tensors": (with_model(n_embd=2 * 10**14), "is of another model"),
    "no width at all": (with_model(n_embd=2 * 10**30), "is of another model"),
    "any positions": (with_model(n_positions=10**15), r"wpe\.weight is float32 \[17, 16\] in the"),
    "a folder for a file": (replaced("config.json", os.mkdir), "config.json is a folder"),
}
if sys.platform != "win32":
    DAMAGES["a pipe"] = (replaced("model.safetensors", os.mkfifo), "is a FIFO, socket or device")


@pytest.mark.parametrize(("damage", "fault"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_refused_with_its_fault(damage, fault, tmp_path):
    small_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=fault):
        looped_fast.from_pretrained(tmp_path)


CONFIG = TrainConfig(n_dims=3, n_points=5, n_positions=7, n_embd=16, n_head=2, n_loops=4, window=2)


def saved_run(folder, **settings):
    """A run's folder with two checkpoints, and the later model."""
    for step in (1, 2):
        model = LoopedTransformer(CONFIG.model_config())
        optimizer = torch.optim.Adam(model.parameters())
        config = {**CONFIG.to_dict(), **settings}
        checkpoint.save(folder, step, model, optimizer, config=config)
    return model


def test_a_run_and_each_of_its_checkpoints_are_loaded(tmp_path):
    newest = saved_run(tmp_path)
    assert_same(looped_fast.from_pretrained(tmp_path), newest)
    first, second = checkpoint.checkpoints(tmp_path)
    assert_same(looped_fast.from_pretrained(str(second)), newest)
    older = looped_fast.from_pretrained(first)
    assert not torch.equal(older._read_in.weight, newest._read_in.weight)
    assert older.config == CONFIG.model_config()


def test_no_module_of_a_task_is_imported(tmp_path, monkeypatch):
    (tmp_path / "malice.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("malice:Task", "nowhere.at.all:Task"):
        run = tmp_path / name.partition(":")[0]
        model = saved_run(run, task={"name": name, "degree": 3})
        assert_same(looped_fast.from_pretrained(run), model)
    assert "malice" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [looped_fast.from_pretrained, lambda run: load_run(run, "cpu")])
@pytest.mark.parametrize("changes", [{"n_layer": 10**9}, {"n_embd": 2 * 10**7}])
def test_a_checkpoint_of_settings_without_end_is_refused(load, changes, tmp_path):
    saved_run(tmp_path)
    for path in checkpoint.checkpoints(tmp_path):
        index = json.loads((path / checkpoint.INDEX).read_text())
        index["config"] |= changes
        (path / checkpoint.INDEX).write_text(json.dumps(sealed(index)))
    with pytest.raises(CheckpointError, match="is of another model"):
        load(tmp_path)


def test_a_classifier_of_tabular_sets_is_refused_with_the_remedy(tmp_path):
    saved_run(tmp_path, held_out="wine")
    with pytest.raises(ValueError, match=r"classifier of tabular sets; python -m looped_fast\.op"):
        looped_fast.from_pretrained(tmp_path)


def test_a_folder_without_a_model_is_answered_with_what_may_be_given(tmp_path):
    (tmp_path / "file.pt").write_bytes(b"")
    for source in (tmp_path, tmp_path / "file.pt"):
        with pytest.raises(
            FileNotFoundError, match="holds no checkpoint; give the folder of a run"
        ):
            looped_fast.from_pretrained(source)
