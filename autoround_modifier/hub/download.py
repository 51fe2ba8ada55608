"""Where a model is that was given by its name."""

from __future__ import annotations

import os
from pathlib import Path

from autoround_modifier.errors import HubError, MissingExtraError
from autoround_modifier.hub.platform import chosen_platform, is_offline

__all__ = ["resolve_model"]

# Weights in formats that Transformers is not asked to read
OTHER_FORMATS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "original/*")
# Weights that were saved by pickle, downloaded only where there are no safetensors
PICKLED = ("*.bin", "*.pt", "*.pth")


def resolve_model(
    name: str | os.PathLike[str],
    platform: str | None = None,
    revision: str | None = None,
) -> str:
    """
    Where to load a model from. A model of ModelScope is downloaded into its cache, or found there.

    :param name: folder, or name on the hub
    :param platform: see `chosen_platform`
    :param revision: on the hub; None for the newest
    :return: the folder as it was given; of ModelScope, the folder in its cache; of Hugging Face,
        the name: Transformers downloads it, and takes ``revision`` itself
    :raises HubError: if there is no such platform or model, or it cannot be downloaded
    :raises MissingExtraError: if ModelScope is asked for and its package is not installed
    """
    text = os.fspath(name)
    chosen = chosen_platform(platform)
    if Path(text).expanduser().exists():
        return str(Path(text).expanduser())
    if chosen == "huggingface":
        return text
    return _from_modelscope(text, revision)


def _from_modelscope(name: str, revision: str | None) -> str:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise MissingExtraError("ModelScope", "modelscope", "modelscope") from error
    offline = is_offline()

    def download(*ignored: str) -> str:
        return snapshot_download(
            name,
            revision=revision,
            local_files_only=offline,
            ignore_patterns=list(ignored),
        )

    try:
        folder = download(*OTHER_FORMATS, *PICKLED)
        if not any(Path(folder).glob("*.safetensors")):
            folder = download(*OTHER_FORMATS)
    except Exception as error:  # of many kinds, by what is missing
        where = "in ModelScope's cache, and HF_HUB_OFFLINE is set" if offline else "on ModelScope"
        raise HubError(
            f"there is no folder `{name}`, and it was not found {where}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return folder
