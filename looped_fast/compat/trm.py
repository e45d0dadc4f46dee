"""Read and write checkpoints of the public Tiny Recursive Model.

Source: SamsungSAILMontreal/TinyRecursiveModels, ``pretrain.py`` and ``models/ema.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from looped_fast.compat.checkpoints import check_tensor, unpickle, write_pickle
from looped_fast.errors import CheckpointError, check_name
from looped_fast.model import TinyRecursiveModel, TRMConfig
from looped_fast.training.checkpoint_check import check_weights
from looped_fast.training.yaml_file import read_yaml

PREFIX = "_orig_mod.model.inner."  # of a compiled model inside its loss
_WRAPPERS = ("_orig_mod.", "module.", "model.", "inner.")
_FIELDS = {field.name for field in dataclasses.fields(TRMConfig)}
# Settings of the public model that change nothing here; H_layers is ignored there, too.
_WITHOUT_EFFECT = (
    "name", "loss", "H_layers", "forward_dtype", "no_ACT_continue", "batch_size", "causal",
)  # fmt: skip
_UNTOLD = ("num_heads", "H_cycles", "L_cycles", "seq_len", "pos_encodings")
_BUFFERS = ("H_init", "L_init", "puzzle_emb.weights")


def load_trm_checkpoint(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    buffers: str | Path | None = None,
    backend: str = "auto",
    **settings: Any,
) -> TinyRecursiveModel:
    """Load a checkpoint of the public code, ``step_<n>``, without running code from it.

    Sizes are read from the tensors. What these do not tell must be given: ``num_heads``,
    ``H_cycles``, ``L_cycles``, ``pos_encodings`` unless they are learned, ``seq_len``, and
    ``puzzle_emb_len`` if puzzles have embeddings. The configuration has them all but ``seq_len``,
    which the public code takes from its data set.

    Args:
        path: what ``torch.save`` made of a state dict. Names may begin with ``_orig_mod.``,
            ``model.``, ``inner.`` and ``module.`` in any order.
        config: the run's ``all_config.yaml``, or its settings as a dict, whole or ``arch`` alone.
        buffers: a checkpoint of the same run, for the initial states and puzzle embeddings that a
            dict of EMA parameters (``EMAHelper.state_dict()``) does not have.
        backend: as in ``TinyRecursiveModel``.
        settings: fields of ``TRMConfig``, which override those of ``config``.

    Returns:
        The model, on the CPU, in the dtype of the parameters.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt, holds code (which is refused,
            not run), numbers that are not finite, or another model.
        ValueError: a setting is missing, unknown, out of range, or not that of the tensors.
        OSError: the configuration can't be read.
    """
    path = Path(path)
    state = _read(path)
    if buffers is not None:
        others = _read(Path(buffers))
        state = {name: others[name] for name in _BUFFERS if name in others} | state
    if lacking := [name for name in _BUFFERS[:2] if name not in state]:
        raise CheckpointError(
            f"{path} has no {', '.join(lacking)}, as a dict of EMA parameters alone; name a "
            f"checkpoint of the same run that has them: buffers=..."
        )
    known = _known_settings(config) | settings
    trm_config = TRMConfig.from_dict(_complete(path, state, known))
    model = TinyRecursiveModel(trm_config, backend)
    dtype = state["embed_tokens.embedding_weight"].dtype
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    check_weights(path, state, model.to(dtype), "Name the configuration of the run that wrote it")
    model.load_state_dict(state)
    return model


def export_trm_checkpoint(path: str | Path, model: TinyRecursiveModel) -> None:
    """Write a checkpoint that the public code loads, of a model inside its loss, compiled.

    Args:
        path: officially ``step_<n>``.
        model: its parameters and buffers are written under the public names.

    Raises:
        OSError: the file can't be written.

    Source: public ``pretrain.py``, ``save_train_state`` and ``load_checkpoint``.
    """
    write_pickle(Path(path), {f"{PREFIX}{name}": t for name, t in model.state_dict().items()})


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by the names of ``TinyRecursiveModel``. Raises CheckpointError."""
    found = unpickle(path, "a step_<n> of the public code")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} holds no state dict, but {type(found).__name__}")
    state = {}
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} holds no state dict: {name!r} is no name of a tensor")
        check_tensor(path, name, tensor)
        state[_unwrapped(name)] = tensor
    if len(state) < len(found):
        raise CheckpointError(f"{path} holds names twice, with and without {', '.join(_WRAPPERS)}")
    return state


def _unwrapped(name: str) -> str:
    while prefix := next((p for p in _WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _known_settings(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of the model in a configuration of the public code, those without effect left out.

    Raises:
        ValueError: it is of another model, or has a setting that the model has not.
    """
    if config is None:
        return {}
    content = config if isinstance(config, Mapping) else read_yaml(config)
    source = "config" if isinstance(config, Mapping) else str(config)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds {content!r}; a dict of settings is needed")
    arch = content.get("arch", content)
    if not isinstance(arch, Mapping):
        raise ValueError(f"{source}: arch = {arch!r}; a dict of settings is needed")
    name = arch.get("name", "trm@")
    if re.search(r"\btrm@", str(name)) is None:
        raise ValueError(
            f"{source}: name = {name!r} is another model; only recursive_reasoning.trm is read"
        )
    for setting in arch:
        check_name(f"setting in {source}:", setting, (*_FIELDS, "mlp_t", *_WITHOUT_EFFECT))
    # ${.hidden_size} and other references are to sizes, which the tensors tell.
    return {
        name: value for name, value in arch.items()
        if name not in _WITHOUT_EFFECT and not str(value).startswith("${")
    }  # fmt: skip


def _complete(path: Path, state: dict[str, Tensor], known: dict[str, Any]) -> dict[str, Any]:
    """The settings that are known, and those that shapes tell.

    Raises:
        CheckpointError: a tensor of every TRM is missing, or no matrix.
        ValueError: a setting is not known, or is not that of the tensors.
    """
    if known.get("mlp_t") or any("mlp_t" in name for name in state):
        TRMConfig(1, 1, mlp_t=True)  # which refuses it
    shapes = {}
    for name in ("embed_tokens.embedding_weight", "L_level.layers.0.mlp.down_proj.weight"):
        if name not in state or state[name].ndim != 2:
            raise CheckpointError(f"{path} has no matrix {name!r}; is it of another model?")
        shapes[name] = state[name].shape
    (vocab_size, D), (_, F) = shapes.values()
    told: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": D,
        "L_layers": sum(
            re.fullmatch(r"L_level\.layers\.\d+\.mlp\.down_proj\.weight", name) is not None
            for name in state
        ),
    }  # fmt: skip
    if "puzzle_emb.weights" in state:
        told["num_puzzle_identifiers"], told["puzzle_emb_ndim"] = state["puzzle_emb.weights"].shape
    if "embed_pos.embedding_weight" in state:
        told["pos_encodings"] = "learned"
    for name, value in told.items():
        if known.get(name, value) != value:
            raise ValueError(f"{name} = {known[name]!r}, but {path} has {value!r}; leave it out")
    # Several expansions round to one width; this one needs no rounding.
    settings = told | {"expansion": 1.5 * F / D} | known
    needed = (*_UNTOLD, "puzzle_emb_len") if "puzzle_emb.weights" in state else _UNTOLD
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(
            f"{', '.join(missing)} can't be told from the tensors of {path}; give them, or the "
            f"run's configuration: load_trm_checkpoint(path, 'all_config.yaml', seq_len=...)"
        )
    return settings
