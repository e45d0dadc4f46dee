"""Models on the Hugging Face hub: of a repository, weights and settings are downloaded alone."""

from __future__ import annotations

import re
from pathlib import Path

from looped_fast.errors import CheckpointError, needs_extra
from looped_fast.model.sharing import CONFIG
from looped_fast.training import checkpoint

# No pickle and no code ever reaches the disk, nor the state of a trainer, which is large.
_FILES = [CONFIG, checkpoint.INDEX, checkpoint.MODEL]
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_id(source: str | Path) -> bool:
    """True for a text such as ``owner/name``."""
    return isinstance(source, str) and _ID.fullmatch(source) is not None


def download(repo_id: str, revision: str | None = None) -> Path:
    """Download a model; return its folder, in huggingface_hub's cache.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; the newest by default.

    Raises:
        RuntimeError: huggingface_hub is not installed; the message gives the command.
        FileNotFoundError: the hub has no such repository, none for this user, or not the revision.
        CheckpointError: the repository holds no model of this library.
        OSError: the hub can't be reached.
    """
    what = f"{repo_id} is no folder here; as a model on the Hugging Face hub it needs"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise needs_extra(what, "huggingface_hub", "hub") from error
    try:
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=_FILES, library_name="looped_fast"
            )
        )
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{repo_id} on the Hugging Face hub needs a login: {error}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} is neither a folder here nor a model on the Hugging Face hub that you may "
            f"read; check the name, or log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} on the Hugging Face hub has no revision {revision!r}; give a branch, a tag "
            f"or a commit of it"
        ) from error
    except OSError as error:
        raise OSError(
            f"{repo_id} is no folder here, and can't be had from the Hugging Face hub: {error}"
        ) from error
    if not any((folder / name).exists() for name in (CONFIG, checkpoint.INDEX)):
        raise CheckpointError(
            f"{repo_id} on the Hugging Face hub holds neither {CONFIG} nor {checkpoint.INDEX}, so "
            f"it is no model of looped_fast; name one that push_to_hub wrote"
        )
    return folder
