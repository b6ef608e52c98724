"""Uploading a saved folder, by transformers' own way, with our card in place of its general one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import logging
from transformers.utils.hub import hf_api

from sedac_hf.saving import CARD_FILE
from sedac_hf.saving.model_card import is_ours
from sedac_hf.saving.writing import save

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

logger = logging.get_logger(__name__)

_ARGUMENTS = (
    "repo_id",
    "token",
    "private",
    "tags",
    "revision",
    "commit_message",
    "commit_description",
    "create_pr",
)


def take_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take those of ``save_pretrained``'s arguments that are about the upload out of the others."""
    return {name: kwargs.pop(name) for name in _ARGUMENTS if name in kwargs}


def save_and_upload(
    model: SedacForCausalLM,
    directory: str | os.PathLike[str],
    hub: Mapping[str, Any],
    *,
    adapter_only: bool,
    **kwargs: Any,
) -> Any:
    """Save, and upload the files that were written; a card in the repository that is not ours stays as it is.

    Args:
        hub: arguments of transformers' ``push_to_hub``; ``repo_id`` is the folder's name by default. The repository is
            made first, so that nothing long is done before a name or token turns out to be wrong.
        kwargs: see `save`.

    Returns:
        What huggingface_hub says of the commit.
    """
    arguments = dict(hub)
    token, revision = arguments.get("token"), arguments.get("revision")
    repo_id = arguments.pop("repo_id", None) or os.path.basename(os.path.realpath(directory))
    private, tags = arguments.pop("private", None), arguments.pop("tags", None)
    repo_id = hf_api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if adapter_only and os.path.isdir(model.model.name_or_path):
        logger.warning(
            f"the adapter names its base as a folder of this machine, {model.model.name_or_path}: elsewhere it is "
            "loaded with `base_model=`"
        )
    before = model._get_files_timestamps(directory) if os.path.isdir(directory) else {}
    save(model, directory, adapter_only=adapter_only, name=repo_id, tags=tags, **kwargs)
    if not _card_may_be_written(repo_id, token, revision):
        before[CARD_FILE] = math.inf
    return model._upload_modified_files(directory, repo_id, before, **arguments)


def _card_may_be_written(repo_id: str, token: bool | str | None, revision: str | None) -> bool:
    for at in dict.fromkeys((revision, None)):  # a branch that is not there yet begins as the main one is
        try:
            return is_ours(Path(hf_hub_download(repo_id, CARD_FILE, token=token, revision=at)))
        except RevisionNotFoundError:
            continue
        except (EntryNotFoundError, RepositoryNotFoundError):
            return True
    return True
