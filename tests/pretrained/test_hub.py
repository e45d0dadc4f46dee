"""Models on the Hugging Face hub, against a stand-in on 127.0.0.1: no other address is called."""

from __future__ import annotations

import socket
import sys

import hub_server
import pytest
import torch
from conftest import prompt, small_model
from hub_server import COMMIT, OLD_COMMIT

import looped_fast
from looped_fast import pretrained
from looped_fast.errors import CheckpointError

huggingface_hub = pytest.importorskip("huggingface_hub")

TOKEN = "hf_secret"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub for this process, with an empty cache; a connection elsewhere is an error."""
    connect = socket.socket.connect

    def connect_here(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a request left this machine, to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    constants = "huggingface_hub.constants"
    with hub_server.running() as server:
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield server


def files_of(model, folder):
    """What ``save_pretrained`` writes, by name."""
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same(model, other):
    assert model.config == other.config
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )
    xs_ys = prompt()
    torch.testing.assert_close(model(*xs_ys), other(*xs_ys), rtol=0, atol=0)


@pytest.fixture
def model():
    return small_model(pred_type="classification", n_layer=2)


def test_a_model_that_is_pushed_is_loaded_by_its_name(hub, model):
    address = model.push_to_hub("me/tiny", private=True, commit_message="A first model")
    assert address == f"{hub.address}/me/tiny/commit/{'3' * 40}"
    loaded = looped_fast.from_pretrained("me/tiny", backend="reference")
    assert loaded.backend == "reference"
    loaded.backend = "auto"
    assert_same(loaded, model)


def test_options_of_the_mixin_reach_the_hub(hub, model):
    model.push_to_hub("me/tiny", private=True, commit_message="A first model", branch="next")
    ((wanted,), (commit,)) = hub.created, hub.commits
    assert (wanted["name"], wanted["organization"], wanted["visibility"]) == (
        "tiny",
        "me",
        "private",
    )
    assert (commit["summary"], commit["branch"]) == ("A first model", "next")
    assert commit["files"] == ["README.md", "config.json", "model.safetensors"]
    assert f"Bearer {TOKEN}" in hub.tokens
    model.push_to_hub("me/other", token="hf_another")
    assert hub.tokens == {f"Bearer {TOKEN}", "Bearer hf_another"}
    with pytest.raises(TypeError, match="publicly"):
        model.push_to_hub("me/tiny", publicly=True)


def test_the_card_says_how_to_load_the_model(hub, model):
    model.push_to_hub("me/tiny")
    card = hub.repositories["me/tiny"][COMMIT]["README.md"].decode()
    assert 'looped_fast.from_pretrained("me/tiny")' in card
    assert "\n# me/tiny\n" in card
    data = huggingface_hub.ModelCard(card).data
    assert data.library_name == "looped_fast"
    assert {"in-context-learning", "looped-transformer", "model_hub_mixin"} == set(data.tags)


def test_a_name_that_the_hub_refuses(hub, model):
    with pytest.raises(ValueError, match="repo"):
        model.push_to_hub("me/tiny/model")
    assert hub.requests == []


def test_neither_pickles_nor_code_reach_the_disk(hub, model, tmp_path):
    files = files_of(model, tmp_path / "saved")
    others = [
        "pytorch_model.bin", "model.pkl", "model.pt", "modeling.py", "setup.py", "other.json",
        "trainer.safetensors", "sub/config.json", "sub/code.py", "checkpoints/model.safetensors",
        "config.json.py", "model.safetensors.pkl", ".gitattributes",
    ]  # fmt: skip
    hub.add("me/tiny", {**files, **dict.fromkeys(others, b"malice")})
    assert_same(looped_fast.from_pretrained("me/tiny"), model)
    assert hub.downloaded() == {"config.json", "model.safetensors"}
    cached = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert not any(b"malice" in file.read_bytes() for file in cached)
    (folder,) = (tmp_path / "cache").glob("models--me--tiny/snapshots/*")
    assert sorted(p.name for p in folder.rglob("*")) == ["config.json", "model.safetensors"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, model, tmp_path):
    older = small_model()
    hub.add("me/tiny", files_of(model, tmp_path / "new"))
    hub.add("me/tiny", files_of(older, tmp_path / "old"), OLD_COMMIT)
    assert_same(looped_fast.from_pretrained("me/tiny"), model)
    for revision in ("v1", OLD_COMMIT):
        assert_same(looped_fast.from_pretrained("me/tiny", revision=revision), older)
    with pytest.raises(FileNotFoundError, match=r"me/tiny .* has no revision 'v2'; give a branch"):
        looped_fast.from_pretrained("me/tiny", revision="v2")


def test_a_folder_here_goes_before_the_hub(hub, model, tmp_path):
    hub.add("me/tiny", files_of(small_model(), tmp_path / "other"))
    model.save_pretrained("me/tiny")
    assert_same(looped_fast.from_pretrained("me/tiny"), model)
    assert hub.requests == []
    with pytest.raises(ValueError, match=r"revision = 'v1' is of a model on the .* hub, and me/ti"):
        looped_fast.from_pretrained("me/tiny", revision="v1")
    with pytest.raises(ValueError, match=r"revision = 'v1' .*, and lr-small is here"):
        looped_fast.from_pretrained("lr-small", revision="v1")


def test_a_repository_that_is_not_there(hub):
    with pytest.raises(FileNotFoundError, match=r"runs/lr is neither a folder here nor a model on"):
        looped_fast.from_pretrained("runs/lr")


def test_a_repository_of_shipped_weights_is_loaded(hub):
    files = {p.name: p.read_bytes() for p in pretrained.path("lr-small").iterdir()}
    hub.add("me/lr", files)
    loaded, shipped = (looped_fast.from_pretrained(name) for name in ("me/lr", "lr-small"))
    states = loaded.state_dict(), shipped.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert hub.downloaded() == {"checkpoint.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"model.bin": b""}, "holds neither config.json nor checkpoint.json"),
        ({"config.json": b'{"model_type": "gpt2"}'}, "is of no model of looped_fast"),
        ({"config.json": b"[]"}, "holds a JSON list"),
        ({"config.json": b"{}", "model.safetensors": b""}, "is of no model of looped_fast"),
    ],
)
def test_a_repository_of_something_else_is_refused(hub, files, fault):
    hub.add("me/tiny", files)
    with pytest.raises(CheckpointError, match=fault):
        looped_fast.from_pretrained("me/tiny")


def test_weights_without_end_are_refused(hub, model, tmp_path):
    files = files_of(model, tmp_path / "saved")
    hub.add("me/tiny", {**files, "model.safetensors": (2**62).to_bytes(8, "little") + b"{}"})
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        looped_fast.from_pretrained("me/tiny")


def test_a_hub_that_can_not_be_reached(hub, model, tmp_path, monkeypatch):
    hub.add("me/tiny", files_of(model, tmp_path / "saved"))
    looped_fast.from_pretrained("me/tiny")
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    assert_same(looped_fast.from_pretrained("me/tiny"), model)  # from the cache
    with pytest.raises(OSError, match="me/none is no folder here, and can't be had from the"):
        looped_fast.from_pretrained("me/none")


def test_without_the_package_the_command_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        RuntimeError,
        match=r"me/tiny is no folder here; as a model on the Hugging Face hub it needs "
        r"huggingface_hub, which is not installed: pip install huggingface_hub",
    ):
        looped_fast.from_pretrained("me/tiny")
    with pytest.raises(RuntimeError, match="push_to_hub needs huggingface_hub, which is not inst"):
        model.push_to_hub("me/tiny")


@pytest.mark.parametrize("source", ["lr-smal", "a/b/c", "/nowhere/run", "../run", "me/", "a b/c"])
def test_what_is_neither_a_folder_nor_a_name_is_answered_with_what_may_be_given(source):
    with pytest.raises(
        ValueError, match=r"unknown pretrained model .* the folder of a run, .* owner/name on the"
    ):
        looped_fast.from_pretrained(source)
