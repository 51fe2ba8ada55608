"""Scores that were measured before, found again by what they were measured on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from autoround_modifier.calibration.samples import content_key
from autoround_modifier.files import write_atomically

__all__ = ["ScoreCache", "default_cache_folder"]

# Part of every key; raise it when scores change their meaning.
VERSION = 1


def default_cache_folder() -> Path:
    """:return: ``$XDG_CACHE_HOME/autoround_modifier/autoscheme``, by default in ``~/.cache``"""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "autoround_modifier" / "autoscheme"


class ScoreCache:
    """
    One file for each scheme. Its name is a hash of the model's weights, the calibration data, the
    settings and the scheme: never of a path or a name.

    :param folder: of the files; created when the first is written
    :param model: its parameters count, by content and name
    :param batches: what is measured on, tensors by name
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
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(content_key(parameter, None))
        for batch in batches:
            for name, value in sorted(batch.items()):
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(content_key(value, None))
        self._key = digest.digest()

    def find(self, scheme: QuantizationScheme) -> dict[str, float] | None:
        """:return: score of each layer, by name; None if they are not known"""
        try:
            return json.loads(self._path(scheme).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def keep(self, scheme: QuantizationScheme, scores: dict[str, float]) -> None:
        """:raises OSError: if the folder cannot be written to"""
        write_atomically(self._path(scheme), json.dumps(scores, indent=1) + "\n")

    def _path(self, scheme: QuantizationScheme) -> Path:
        content = scheme.model_dump_json(exclude={"targets"})
        name = hashlib.blake2b(content.encode(), key=self._key[:64], digest_size=16).hexdigest()
        return self.folder / f"{name}.json"
