"""Models as folders of safetensors and JSON, here and on the Hugging Face hub.

``save_pretrained`` writes ``model.safetensors``, under the official parameter names,
``config.json``, and ``README.md``, the model's card. ``looped_fast.from_pretrained`` reads the
first two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from looped_fast.config import VERSION, ModelConfig
from looped_fast.errors import CheckpointError, needs_extra

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_TAGS = ("in-context-learning", "looped-transformer", "model_hub_mixin")


class Shareable(nn.Module):
    """A model that is made from its ``config`` alone, and can be saved and shared."""

    config: ModelConfig

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, configuration and card to ``folder``, for ``from_pretrained``.

        A card that is there already is kept.

        Args:
            folder: created if absent.

        Raises:
            ValueError: the model has other parameters than a new one of its ``config``: adapters,
                say, or replaced modules.
            CheckpointError: the folder can't be written.
        """
        _save(self, Path(folder), Path(folder).resolve().name)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what ``save_pretrained`` writes to the Hugging Face hub.

        Args:
            repo_id: ``owner/name``; the repository is created if absent.
            options: those of ``huggingface_hub.ModelHubMixin.push_to_hub``: ``private``,
                ``commit_message``, ``branch``, ``create_pr``, ``token`` and others.

        Returns:
            The address of the commit.

        Raises:
            RuntimeError: huggingface_hub is not installed; the message gives the command.
            ValueError: as in ``save_pretrained``, or a name that the hub refuses.
            OSError: the hub can't be reached, or refuses the upload.
        """
        try:
            from huggingface_hub import ModelHubMixin
        except ImportError as error:
            raise needs_extra("push_to_hub needs", "huggingface_hub", "hub") from error

        class Upload(ModelHubMixin, library_name="looped_fast"):
            """What the mixin asks for."""

            def _save_pretrained(upload, save_directory: Path) -> None:
                _save(self, save_directory, repo_id)

        return Upload().push_to_hub(repo_id, **options)


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    return to_safetensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _save(model: Shareable, folder: Path, name: str) -> None:
    _check_parameters(model)
    settings = {
        "library_name": "looped_fast",
        "looped_fast_version": VERSION,
        "format_version": FORMAT_VERSION,
        "model": model.config.to_dict(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # written last: a folder with it is complete
        (folder / WEIGHTS).write_bytes(pack(model.state_dict()))
        if not (folder / CARD).exists():
            (folder / CARD).write_text(_card(model, name), encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"can't write {folder}: {error}; choose a folder that you may write to"
        ) from error


def _check_parameters(model: Shareable) -> None:
    with torch.device("meta"):
        wanted = type(model)(model.config).state_dict()
    found = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    others = [name for name in {**shapes, **found} if _shape(found, name) != shapes.get(name)]
    if others:
        raise ValueError(
            f"{', '.join(others[:3])} and what else differs from a new model of this config can't "
            f"be saved: merge adapters into the model, and put back replaced modules"
        )


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _card(model: Shareable, name: str) -> str:
    size = sum(p.numel() for p in model.parameters())
    settings = "\n".join(f"| `{k}` | {v} |" for k, v in dataclasses.asdict(model.config).items())
    tags = "\n".join(f"- {tag}" for tag in _TAGS)
    return f"""---
library_name: looped_fast
tags:
{tags}
---

# {name}

A model of looped_fast ([arXiv 2311.12424](https://arxiv.org/abs/2311.12424)) that predicts y from
the examples in its prompt: {size:,} parameters.

```python
import looped_fast

model = looped_fast.from_pretrained("{name}")
predictions = model(xs, ys)[-1]  # xs: [B, n, {model.config.n_dims}], ys: [B, n]
```

| setting | value |
|---|---|
{settings}
"""
