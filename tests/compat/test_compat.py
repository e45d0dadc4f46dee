from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from golden_cases import (
    MODEL_CASES,
    assert_as_good_as_plain,
    load_case,
    load_tensors,
    loss_of,
    plain_predictions,
    with_prefix,
)

from looped_fast import LoopedTransformer, ModelConfig, compat
from looped_fast.training.checkpoint import CheckpointError


def conf(family="gpt2_loop", n_layer=1, **other):
    sizes = {"n_dims": 5, "n_positions": 11, "n_embd": 64, "n_head": 4}
    return SimpleNamespace(family=family, n_layer=n_layer, **{**sizes, **other})


def predict(model, config, xs, ys):
    """Call with the official signature; return [W, B, n(, 2)]."""
    if config["family"] == "gpt2_loop":
        return torch.stack(model(xs, ys, config["n_loop_start"], config["n_loops"]))
    return model(xs, ys, add_inputs_embeds=config["add_inputs_embeds"]).unsqueeze(0)


def run(case, dtype):
    """Name -> tensor: predictions, loss and every gradient of our model."""
    model = compat.build_model(case.conf).double()
    model.load_state_dict(case.params)
    model.to(dtype)
    preds = predict(model, case.config, case.xs.to(dtype), case.ys.to(dtype))
    loss = loss_of(preds, case.ys.to(dtype), case.config["pred_type"])
    loss.backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return {"preds": preds.detach(), "loss": loss.detach(), **grads}


def run_plain(case, dtype):
    params = {k: v.to(dtype, copy=True).requires_grad_() for k, v in case.params.items()}
    preds = plain_predictions(case, params, case.xs.to(dtype), case.ys.to(dtype))
    loss = loss_of(preds, case.ys.to(dtype), case.config["pred_type"])
    loss.backward()
    grads = {f"grad {name}": p.grad for name, p in params.items()}
    return {"preds": preds.detach(), "loss": loss.detach(), **grads}


def golden(case):
    return {
        "preds": case.preds,
        "loss": case.loss,
        **{f"grad {name}": g for name, g in case.grads.items()},
    }


def error(result, truth):
    """Largest deviation relative to the largest value."""
    assert result.shape == truth.shape
    return ((result.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


@pytest.mark.parametrize("name", MODEL_CASES)
def test_float64_equals_the_official_model(name):
    case = load_case(name)
    ours, truth = run(case, torch.float64), golden(case)
    assert ours.keys() == truth.keys()
    for key in truth:
        assert ours[key].dtype == torch.float64
        assert error(ours[key], truth[key]) <= 1e-10, key


@pytest.mark.parametrize("name", MODEL_CASES)
def test_float32_is_as_exact_as_plain_pytorch(name):
    case = load_case(name)
    plain = run_plain(case, torch.float32)
    assert_as_good_as_plain(case, run(case, torch.float32), plain, golden(case))


def test_float32_at_paper_size_is_as_exact_as_plain_pytorch():
    case = load_case("looped_paper_lr")  # recorded in float32, on another machine
    plain, truth = run_plain(case, torch.float32), run_plain(case, torch.float64)
    assert_as_good_as_plain(case, golden(case), plain, truth)  # so truth is the official model's
    assert_as_good_as_plain(case, run(case, torch.float32), plain, truth)


def test_training_follows_the_official_run():
    config, tensors = load_tensors("train_looped_tiny")
    model = compat.build_model(SimpleNamespace(**config))
    model.load_state_dict(with_prefix(tensors, "init/"))
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    losses = []
    for xs, ys in zip(tensors["xs"], tensors["ys"], strict=True):
        preds = model(xs, ys, config["n_loops"] - config["window"], config["n_loops"])
        loss = loss_of(torch.stack(preds), ys, config["pred_type"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), tensors["losses"], rtol=1e-5, atol=0)
    moved = {k: tensors[f"final/{k}"] - v for k, v in with_prefix(tensors, "init/").items()}
    for name, parameter in model.state_dict().items():
        deviation = (parameter - tensors[f"final/{name}"]).norm()
        assert deviation <= 1e-3 * moved[name].norm(), name


# sha256 of the float32 weights in state-dict order (little endian), and of torch.rand(3) drawn
# next, after torch.manual_seed(42) and the official build_model (scripts/models.py at
# Leiay/looped_transformer, run under torch 2.13.0 on a CPU) with the sizes of conf().
OFFICIAL_DRAWS = {
    ("gpt2_loop", 1): "db9c65ce4da6f7a94806e9a3fcd4854afc9840f8d09d19be69538e4ec43011df",
    ("gpt2_loop", 2): "a9e439691da20e8daea2baba51750492bc87335844d68cdc3a6ceee2466f34eb",
    ("gpt2", 3): "42dc154a7c872772cfbd04801a27f1984db7f86669097fd875e4fb024bf336dd",
    ("gpt2_tying", 4): "099a71007cb3a7698cc4896077ce86fb28c364485bd7ad934a3ca3eda45bac4e",
}


@pytest.mark.parametrize(("family", "n_layer"), OFFICIAL_DRAWS)
def test_a_seed_draws_the_official_weights(family, n_layer):
    torch.manual_seed(42)
    model = compat.build_model(conf(family, n_layer))
    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), torch.rand(3)):
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == OFFICIAL_DRAWS[family, n_layer]


@pytest.mark.parametrize("name", MODEL_CASES)
def test_state_dict_has_the_official_names_and_shapes(name):
    case = load_case(name)
    shapes = {k: v.shape for k, v in compat.build_model(case.conf).state_dict().items()}
    assert shapes == {k: v.shape for k, v in case.params.items()}


@pytest.mark.parametrize(
    ("family", "signature"),
    [
        ("gpt2_loop", "(xs, ys, n_loop_start, n_loops)"),
        ("gpt2", "(xs, ys, add_inputs_embeds=False)"),
        ("gpt2_tying", "(xs, ys, add_inputs_embeds)"),
    ],
)
def test_forward_has_the_official_signature(family, signature):
    model = compat.build_model(conf(family, 2))
    assert isinstance(model, LoopedTransformer)
    parameters = inspect.signature(model.forward).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == signature


@pytest.mark.parametrize(
    ("start", "n_loops", "length"),
    [(0, 3, 3), (1, 3, 2), (3, 3, 0), (5, 3, 0), (-2, 3, 3), (0, 0, 0)],
)
def test_looped_returns_a_list_as_long_as_the_official_one(start, n_loops, length):
    preds = compat.build_model(conf())(torch.randn(2, 4, 5), torch.randn(2, 4), start, n_loops)
    assert type(preds) is list
    assert [p.shape for p in preds] == [(2, 4)] * length


def test_injection_is_chosen_by_the_call():
    xs, ys = torch.randn(2, 4, 5), torch.randn(2, 4)
    model = compat.build_model(conf("gpt2", 2))
    without, added = model(xs, ys), model(xs, ys, add_inputs_embeds=True)
    assert not torch.equal(without, added)
    assert torch.equal(model(xs, ys), without)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(xs, ys, True), added)
    assert torch.equal(compiled(xs, ys, False), without)


def test_weight_tied_model_ignores_the_flag_and_pred_type_as_the_official_one_does():
    xs, ys = torch.randn(2, 4, 5), torch.randn(2, 4)
    model = compat.build_model(conf("gpt2_tying", 2, pred_type="classification"))
    assert model(xs, ys, False).shape == (2, 4)
    assert torch.equal(model(xs, ys, True), model(xs, ys, False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "gpt2_lop"}, "unknown family 'gpt2_lop'; did you mean 'gpt2_loop'?"),
        ({"loop_func": "z=f(x-z)"}, "unknown loop_func 'z=f"),
        ({"pred_type": "regresion"}, "did you mean 'regression'?"),
        ({"n_head": 5}, "n_embd = 64 is not divisible by n_head = 5"),
    ],
)
def test_build_model_refuses_unknown_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compat.build_model(conf(**settings))


def trained(family="gpt2_loop", n_layer=1):
    model = compat.build_model(conf(family, n_layer))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    args = (0, 2) if family == "gpt2_loop" else (False,)
    preds = model(torch.randn(2, 4, 5), torch.randn(2, 4), *args)
    torch.stack(list(preds)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_state_pt_comes_back_as_exported(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "state.pt"
    compat.export_official_checkpoint(path, model.state_dict(), optimizer.state_dict(), 7)
    # Official scripts/main_utils.py, load_pretrained_model, reads just these.
    assert list(torch.load(path)) == ["model_state_dict", "optimizer_state_dict", "train_step"]
    checkpoint = compat.load_official_checkpoint(path)
    assert checkpoint.train_step == 7
    assert_same(checkpoint.model_state, model.state_dict())
    other = torch.optim.Adam(compat.build_model(conf()).parameters())
    other.load_state_dict(checkpoint.optimizer_state)
    for i, state in optimizer.state_dict()["state"].items():
        assert_same(other.state_dict()["state"][i], state)
    assert os.listdir(tmp_path) == ["state.pt"]


def test_model_pt_comes_back_with_the_step_of_its_name(tmp_path):
    model, _ = trained("gpt2", 2)
    path = tmp_path / "model_4000.pt"
    compat.export_official_checkpoint(path, model.state_dict())
    assert list(torch.load(path)) == ["model"]
    checkpoint = compat.load_official_checkpoint(path)
    assert checkpoint.train_step == 4000
    assert checkpoint.optimizer_state is None
    assert_same(checkpoint.model_state, model.state_dict())


def test_the_prefix_of_a_compiled_model_is_stripped(tmp_path):
    model, _ = trained()
    path = tmp_path / "weights.pt"
    torch.save({"model": torch.compile(model).state_dict()}, path)
    assert all(name.startswith("_orig_mod.") for name in torch.load(path)["model"])
    checkpoint = compat.load_official_checkpoint(path)
    assert_same(checkpoint.model_state, model.state_dict())
    assert checkpoint.train_step is None


def test_export_needs_all_that_its_layout_holds(tmp_path):
    with pytest.raises(ValueError, match="give both optimizer_state and train_step"):
        compat.export_official_checkpoint(tmp_path / "state.pt", {}, {})
    with pytest.raises(ValueError, match=r"call it model_<step>\.pt"):
        compat.export_official_checkpoint(tmp_path / "state.pt", {})
    assert os.listdir(tmp_path) == []


class CreatesAFile:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("bare", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, bare):
    path, trap = tmp_path / "model_1.pt", tmp_path / "trap"
    if bare:
        path.write_bytes(pickle.dumps({"model": CreatesAFile(trap)}))
    else:
        torch.save({"model": CreatesAFile(trap)}, path)
    reason = r"was not written by torch\.save" if bare else "refused.*code.*mkdir"
    with pytest.raises(CheckpointError, match=reason):
        compat.load_official_checkpoint(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(CreatesAFile(trap)))
    assert trap.exists()  # so the pickle was dangerous


def test_damaged_files_are_told_apart_from_good_ones(tmp_path):
    model, _ = trained()
    path = tmp_path / "model_1.pt"
    compat.export_official_checkpoint(path, model.state_dict())
    content = path.read_bytes()
    weights = model.state_dict()["_read_in.weight"].numpy().tobytes()
    middle = content.index(weights) + 20
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged, reason in [
        (content[: len(content) // 2], "truncated"),
        (b"", "truncated"),
        (flipped, "corrupt.*checksum"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"model_1\.pt is {reason}"):
            compat.load_official_checkpoint(path)
    path.write_bytes(content)
    compat.load_official_checkpoint(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pt is no regular file"):
        compat.load_official_checkpoint(tmp_path / "gone.pt")
    for content in ({"weights": {}}, {"model": torch.ones(2)}, torch.ones(2)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=r"other\.pt is neither a state\.pt"):
            compat.load_official_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("name", MODEL_CASES)
def test_model_config_is_read_from_shapes(name):
    case = load_case(name)
    built = compat.build_model(case.conf).config
    settings = {k: getattr(built, k) for k in ("n_loops", "window", "injection")}
    config = compat.model_config_from_state_dict(case.params, built.n_head, **settings)
    assert config == built
    LoopedTransformer(config).load_state_dict(case.params)


def test_model_config_needs_an_official_state_dict():
    with pytest.raises(CheckpointError, match=r"no matrix '_read_in\.weight' in the state dict"):
        compat.model_config_from_state_dict({}, 8)
    assert ModelConfig().n_head == 8  # the paper's, as the docstring says
