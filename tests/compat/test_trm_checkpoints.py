"""Checkpoints of the public Tiny Recursive Model, in both directions."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
import yaml

from looped_fast import TinyRecursiveModel, TRMConfig, compat
from looped_fast.errors import CheckpointError

CONFIG = TRMConfig(
    7, 9, hidden_size=64, num_heads=4, L_layers=3, H_cycles=2, L_cycles=4, expansion=8.0,
    puzzle_emb_ndim=64, puzzle_emb_len=2, num_puzzle_identifiers=5, halt_max_steps=3,
)  # fmt: skip
# What the public run writes beside its checkpoints; vocab_size and others come from its data set.
ALL_CONFIG = {
    "arch": {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "H_cycles": 2, "L_cycles": 4, "H_layers": 0, "L_layers": 3, "hidden_size": 64,
        "num_heads": 4, "expansion": 8, "puzzle_emb_ndim": 64, "puzzle_emb_len": 2,
        "pos_encodings": "rope", "forward_dtype": "bfloat16", "mlp_t": False,
        "no_ACT_continue": True, "halt_max_steps": 3, "halt_exploration_prob": 0.1,
    },
    "data_paths": ["data/sudoku"], "global_batch_size": 768, "lr": 1e-4, "ema": True,
}  # fmt: skip
PUZZLES = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(1))
IDS = torch.arange(4)
PREFIXES = ("", "inner.", "model.inner.", "_orig_mod.model.inner.", "model._orig_mod.inner.",
            "module._orig_mod.model.inner.", "model.inner._orig_mod.")  # fmt: skip


def build(config=CONFIG):
    torch.manual_seed(0)
    model = TinyRecursiveModel(config)
    torch.nn.init.normal_(model.q_head.weight)
    if config.puzzle_emb_ndim:
        torch.nn.init.normal_(model.puzzle_emb.weights)
    return model


def saved(tmp_path, state=None, prefix="_orig_mod.model.inner.", name="step_100"):
    state = build().state_dict() if state is None else state
    torch.save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / name)
    return tmp_path / name


def assert_same_model(a, b, ids=IDS):
    torch.testing.assert_close(
        a(PUZZLES, puzzle_identifiers=ids), b(PUZZLES, puzzle_identifiers=ids), rtol=0, atol=0
    )


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_may_have_any_prefixes(prefix, tmp_path):
    model = compat.load_trm_checkpoint(saved(tmp_path, prefix=prefix), ALL_CONFIG, seq_len=9)
    assert model.config == CONFIG
    assert_same_model(model, build())


@pytest.mark.parametrize("form", ["all_config.yaml", "arch alone", "settings"])
def test_the_configuration_may_come_as_a_file_a_dict_or_settings(form, tmp_path):
    path, settings = saved(tmp_path), {"seq_len": 9}
    config = ALL_CONFIG["arch"]
    if form == "all_config.yaml":
        config = tmp_path / form
        config.write_text(yaml.dump(ALL_CONFIG), encoding="utf-8")
    if form == "settings":
        config = None
        settings |= {"num_heads": 4, "H_cycles": 2, "L_cycles": 4, "pos_encodings": "rope",
                     "puzzle_emb_len": 2, "halt_max_steps": 3}  # fmt: skip
    model = compat.load_trm_checkpoint(path, config, **settings)
    expansion = 12.0 if form == "settings" else 8.0  # of the same width, 512
    assert model.config == dataclasses.replace(CONFIG, expansion=expansion)
    assert_same_model(model, build())


def test_references_of_the_configuration_are_read_from_the_tensors(tmp_path):
    arch = {**ALL_CONFIG["arch"], "puzzle_emb_ndim": "${.hidden_size}"}
    assert compat.load_trm_checkpoint(saved(tmp_path), arch, seq_len=9).config == CONFIG


def test_settings_override_the_configuration(tmp_path):
    model = compat.load_trm_checkpoint(saved(tmp_path), ALL_CONFIG, seq_len=9, L_cycles=5)
    assert model.config.L_cycles == 5


@pytest.mark.parametrize("positions", ["learned", "none"])
def test_sizes_are_read_from_the_tensors(positions, tmp_path):
    config = TRMConfig(5, 9, 32, 2, L_layers=1, expansion=20.0, pos_encodings=positions)
    path = saved(tmp_path, build(config).state_dict())
    given = {} if positions == "learned" else {"pos_encodings": "none"}
    model = compat.load_trm_checkpoint(
        path, num_heads=2, H_cycles=3, L_cycles=6, seq_len=9, **given
    )
    assert model.config.mlp_hidden == config.mlp_hidden == 512
    inputs = PUZZLES.clamp_max(4)
    assert torch.equal(model(inputs).logits, build(config)(inputs).logits)


def test_states_in_bf16_become_those_of_the_parameters(tmp_path):
    state = build().state_dict()
    for name in ("H_init", "L_init"):  # forward_dtype: bfloat16
        state[name] = state[name].bfloat16()
    model = compat.load_trm_checkpoint(saved(tmp_path, state), ALL_CONFIG, seq_len=9)
    assert model.H_init.dtype == torch.float32
    assert torch.equal(model.H_init, state["H_init"].float())


def test_double_parameters_stay_double(tmp_path):
    path = saved(tmp_path, build().double().state_dict())
    model = compat.load_trm_checkpoint(path, ALL_CONFIG, seq_len=9)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64}
    assert_same_model(model, build().double())


def test_ema_parameters_take_what_they_lack_from_a_checkpoint(tmp_path):
    buffers = ("H_init", "L_init", "puzzle_emb.weights")
    shadow = {k: 0.5 * t for k, t in build().state_dict().items() if k not in buffers}
    path = saved(tmp_path, shadow, name="ema")
    with pytest.raises(CheckpointError, match=r"ema has no H_init, L_init, .*EMA.*buffers="):
        compat.load_trm_checkpoint(path, ALL_CONFIG, seq_len=9)
    model = compat.load_trm_checkpoint(path, ALL_CONFIG, buffers=saved(tmp_path), seq_len=9)
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], shadow["lm_head.weight"])
    for name in buffers:
        assert torch.equal(state[name], build().state_dict()[name])


def test_an_export_is_read_back_and_has_the_public_names(tmp_path):
    model = build()
    compat.export_trm_checkpoint(tmp_path / "step_7", model)
    names = torch.load(tmp_path / "step_7", weights_only=True)
    assert all(name.startswith("_orig_mod.model.inner.") for name in names)
    assert "_orig_mod.model.inner.L_level.layers.2.self_attn.qkv_proj.weight" in names
    assert_same_model(compat.load_trm_checkpoint(tmp_path / "step_7", ALL_CONFIG, seq_len=9), model)


# Refusals


def without(*names):
    state = build().state_dict()
    for name in names:
        del state[name]
    return state


def with_nan():
    state = build().state_dict()
    state["lm_head.weight"][0, 0] = torch.nan
    return state


BAD_STATES = {
    "another model": ({"weight": torch.zeros(3)}, "has no H_init, L_init"),
    "no blocks": (without("L_level.layers.0.mlp.down_proj.weight"), "no matrix 'L_level.layers.0"),
    "a weight less": (without("lm_head.weight"), "lm_head.weight is missing"),
    "two networks": (
        {**build().state_dict(), "H_level.layers.0.mlp.down_proj.weight": torch.zeros(64, 512)},
        "H_level.layers.0.mlp.down_proj.weight is unexpected",
    ),
    "NaN": (with_nan(), "lm_head.weight holds 1 of 448 numbers NaN or Inf"),
    "whole numbers": ({**build().state_dict(), "H_init": torch.arange(64)}, "H_init holds int64"),
}  # fmt: skip


@pytest.mark.parametrize(("state", "message"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_file_of_something_else_is_refused(state, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        compat.load_trm_checkpoint(saved(tmp_path, state), ALL_CONFIG, seq_len=9)


class Code:
    def __reduce__(self):
        return print, ("code that ran",)


def test_a_file_that_holds_code_is_refused_and_runs_none(tmp_path, capsys):
    torch.save({"H_init": Code()}, tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="holds code"):
        compat.load_trm_checkpoint(tmp_path / "step_1")
    (tmp_path / "step_2").write_bytes(pickle.dumps({"H_init": Code()}))
    with pytest.raises(CheckpointError, match=r"not written by torch.save"):
        compat.load_trm_checkpoint(tmp_path / "step_2")
    with pytest.raises(CheckpointError, match=r"no regular file; name a step_<n>"):
        compat.load_trm_checkpoint(tmp_path / "step_3")
    assert "code that ran" not in capsys.readouterr().out


def test_names_with_and_without_prefixes_are_refused(tmp_path):
    state = build().state_dict()
    torch.save({**state, "inner.H_init": state["H_init"]}, tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="holds names twice"):
        compat.load_trm_checkpoint(tmp_path / "step_1", ALL_CONFIG, seq_len=9)


ARCH = ALL_CONFIG["arch"]
BAD_CONFIGS = {
    "nothing": (None, {}, "num_heads, H_cycles, L_cycles, seq_len, pos_encodings, puzzle_emb_len "),
    "no length": (ARCH, {}, "seq_len can't be told from the tensors"),
    "another size": ({**ARCH, "hidden_size": 128}, {}, "hidden_size = 128, but .* has 64"),
    "more layers": (ARCH, {"L_layers": 4}, "L_layers = 4, but .* has 3"),
    "another width": ({**ARCH, "expansion": 4}, {"seq_len": 9}, "is of another model"),
    "mlp_t": ({**ARCH, "mlp_t": True}, {"seq_len": 9}, "mlp_t = True: .*mlp_t=False"),
    "another architecture": (
        {**ARCH, "name": "recursive_reasoning.trm_singlez@TinyRecursiveReasoningModel_ACTV1"}, {},
        "trm_singlez.* is another model",
    ),
    "unknown setting": ({**ARCH, "L_cycle": 3}, {}, "'L_cycle'; did you mean 'L_cycles'"),
    "unknown argument": (ARCH, {"seq_length": 9, "seq_len": 9}, "did you mean 'seq_len'"),
    "no settings": ({"arch": "trm"}, {}, "arch = 'trm'; a dict of settings"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "settings", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys()
)
def test_a_wrong_configuration_is_refused_by_the_setting(config, settings, message, tmp_path):
    with pytest.raises((ValueError, CheckpointError), match=message):
        compat.load_trm_checkpoint(saved(tmp_path), config, **settings)


def test_blocks_with_mlp_t_are_refused_by_their_tensors(tmp_path):
    state = build().state_dict()
    state["L_level.layers.0.mlp_t.down_proj.weight"] = torch.zeros(11, 256)
    with pytest.raises(ValueError, match="mlp_t = True: an MLP across tokens"):
        compat.load_trm_checkpoint(saved(tmp_path, state), ALL_CONFIG, seq_len=9)
