"""Uploads a checkpoint, once it is known to load."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from autoround_modifier.checkpoints.check import check_checkpoint
from autoround_modifier.engines.problem import Problem
from autoround_modifier.errors import CheckpointError, HubError, MissingExtraError
from autoround_modifier.hub.platform import Platform, chosen_platform, is_offline
from autoround_modifier.runs.files import TEMPORARY_PREFIX

__all__ = ["Upload", "check_before_upload", "check_repository", "upload_checkpoint"]

CARD = "README.md"
# Where ModelScope's client notes what it has uploaded, so that it can go on after an interruption
MODELSCOPE_PROGRESS = ".ms_upload_cache"
# Files of processes that were killed while they wrote, and notes on uploads
IGNORED = (f"{TEMPORARY_PREFIX}*", f"*/{TEMPORARY_PREFIX}*", MODELSCOPE_PROGRESS)


@dataclass(frozen=True)
class Upload:
    """
    :param platform: ``huggingface`` or ``modelscope``
    :param repository: owner and name
    :param url: of its page
    """

    platform: str
    repository: str
    url: str


def check_before_upload(folder: Path, force: bool = False) -> list[Problem]:
    """
    :param folder: of a checkpoint
    :param force: let what is wrong pass, with a warning
    :return: what is wrong and does not stop a checkpoint from loading
    :raises CheckpointError: if the folder is none of a checkpoint, or, without ``force``, an engine
        would refuse or misread it
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    if not (folder / CARD).is_file():
        logger.warning(
            f"{folder} has no model card; `autoround-modifier card {folder}` writes {CARD}"
        )
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        logger.warning(f"{folder} holds GGUF files, which are not checked")
        return []
    problems = check_checkpoint(folder)
    fatal = [problem for problem in problems if problem.fatal]
    if fatal and not force:
        raise CheckpointError(
            f"{folder} does not load, or loads as another model; `--force` uploads it all the "
            "same:\n  " + "\n  ".join(map(str, fatal))
        )
    return fatal + [problem for problem in problems if not problem.fatal]


def check_repository(repository: str, platform: str | None = None) -> Platform:
    """
    :param repository: owner and name
    :param platform: see `chosen_platform`
    :return: where it would be uploaded to; the hub is not asked
    :raises HubError: if there is no such platform, it is no name, or HF_HUB_OFFLINE is set
    """
    chosen = chosen_platform(platform)
    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise HubError(f"`{repository}` is no name of a repository; give OWNER/NAME")
    if is_offline():
        raise HubError("HF_HUB_OFFLINE is set, so nothing is uploaded")
    return chosen


def upload_checkpoint(
    folder: Path,
    repository: str,
    *,
    platform: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Upload:
    """
    Make the repository if it is not there, and upload all files of a folder. Files on the hub that
    the folder does not have stay as they are.

    :param folder: of a checkpoint
    :param repository: owner and name
    :param platform: see `chosen_platform`
    :param private: make a new repository private; one that exists is left as it is
    :param revision: branch to commit to, which is made if it is not there; None for the main one
    :param message: of the commit
    :param token: None for the one that was saved by the hub's own login
    :raises HubError: if HF_HUB_OFFLINE is set, or the hub refuses
    :raises MissingExtraError: if ModelScope is asked for and its package is not installed
    """
    chosen = check_repository(repository, platform)
    to_hub = _to_huggingface if chosen == "huggingface" else _to_modelscope
    commit = {"revision": revision, "commit_message": message or f"Upload {folder.name}"}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # ModelScope's client prints a report
            url = to_hub(folder, repository, private, token, commit)
    except MissingExtraError:
        raise
    except Exception as error:  # of many kinds, by hub
        raise HubError(f"{repository}: {type(error).__name__}: {error}") from error
    return Upload(chosen, repository, url)


def _to_huggingface(
    folder: Path, repository: str, private: bool, token: str | None, commit: dict[str, Any]
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    url = api.create_repo(repository, private=private, exist_ok=True)
    if commit["revision"] is not None:
        api.create_branch(repository, branch=commit["revision"], exist_ok=True)
    api.upload_folder(
        repo_id=repository, folder_path=folder, ignore_patterns=list(IGNORED), **commit
    )
    return str(url)


def _to_modelscope(
    folder: Path, repository: str, private: bool, token: str | None, commit: dict[str, Any]
) -> str:
    try:
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise MissingExtraError("ModelScope", "modelscope", "modelscope") from error

    api = HubApi(token=token)
    license_name = _license(folder)
    if license_name is None:
        logger.warning(
            "the model card names no license; ModelScope records Apache-2.0 for a new repository"
        )
    api.create_repo(
        repository,
        token=token,
        visibility="private" if private else "public",
        license=license_name,
        exist_ok=True,
    )
    api.upload_folder(repository, folder, token=token, ignore_patterns=list(IGNORED), **commit)
    (folder / MODELSCOPE_PROGRESS).unlink(missing_ok=True)
    return f"{api.endpoint}/models/{repository}"


def _license(folder: Path) -> str | None:
    """:return: of the front matter of the model card"""
    from huggingface_hub import ModelCard

    if not (folder / CARD).is_file():
        return None
    found = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.license
    return None if found is None else str(found)
