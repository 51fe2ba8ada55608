"""Scores that were measured before, found again by what they were measured on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loguru import logger
from torch import Tensor, nn

from autoround_modifier.blocks.samples import content_key
from autoround_modifier.host.schemes import QuantizationScheme
from autoround_modifier.runs.files import write_atomically

__all__ = ["ScoreCache", "default_cache_folder"]

# Part of every key; raise it when scores change their meaning.
VERSION = 1
# What a config says of where a model comes from.
NOT_CONTENT = ("_name_or_path", "transformers_version")


def default_cache_folder() -> Path:
    """:return: ``$XDG_CACHE_HOME/autoround_modifier/autoscheme``, by default in ``~/.cache``"""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "autoround_modifier" / "autoscheme"


class ScoreCache:
    """
    One file for each scheme. Its name is a hash of the model's weights, the calibration data, the
    settings and the scheme: never of a path or a name.

    :param folder: of the files; created when the first is written
    :param model: its parameters, buffers and config count, by content
    :param batches: what is measured on
    :param settings: whatever else the scores depend on
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        batches: Iterable[dict[str, Any]],
        settings: dict[str, Any],
    ):
        self.folder = folder
        digest = hashlib.blake2b(json.dumps([VERSION, settings], sort_keys=True).encode())
        config = getattr(model, "config", None)
        if config is not None:
            content = {k: v for k, v in config.to_dict().items() if k not in NOT_CONTENT}
            digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            _count_in(digest, name, tensor)
        for batch in batches:
            for name, value in sorted(batch.items()):
                _count_in(digest, name, value)
        self._key = digest.digest()

    def find(self, scheme: QuantizationScheme) -> dict[str, float] | None:
        """:return: score of each layer, by name; None if they are not known, or not readable"""
        path = self._path(scheme)
        if not path.exists():
            return None
        try:
            return {str(k): float(v) for k, v in json.loads(path.read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning(f"{path} cannot be read, so its scores are measured again: {error}")
            return None

    def keep(self, scheme: QuantizationScheme, scores: dict[str, float]) -> None:
        """Write scores down; where that fails, say so and go on."""
        path = self._path(scheme)
        try:
            write_atomically(path, json.dumps(scores, indent=1) + "\n")
        except OSError as error:
            logger.warning(f"the scores are not kept for another run: {error}")

    def _path(self, scheme: QuantizationScheme) -> Path:
        content = scheme.model_dump_json(exclude={"targets"})
        name = hashlib.blake2b(content.encode(), key=self._key[:64], digest_size=16).hexdigest()
        return self.folder / f"{name}.json"


def _count_in(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(content_key(value, None))
    else:
        digest.update(f"{name} {value}".encode())
