"""Scores that were measured before, found again by what they were measured on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from autoround_modifier.blocks.samples import content_key
from autoround_modifier.host.layers import get_execution_device
from autoround_modifier.host.schemes import QuantizationScheme
from autoround_modifier.host.versions import library_versions
from autoround_modifier.runs.files import not_private_reason, write_atomically
from autoround_modifier.runs.sources import source_digest
from autoround_modifier.version import __version__

__all__ = ["ScoreCache", "default_cache_folder"]

# The code that computes scores.
COMPUTING_ROOMS = ("blocks", "formats", "schemes", "search")
# What a config says of where a model comes from.
NOT_CONTENT = ("_name_or_path", "transformers_version")


def default_cache_folder() -> Path:
    """:return: ``$XDG_CACHE_HOME/autoround_modifier/autoscheme``, by default in ``~/.cache``"""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "autoround_modifier" / "autoscheme"


class ScoreCache:
    """
    One file for each scheme. Its name is a hash of all that scores depend on: the model's weights,
    the calibration data, the settings, the scheme, this package, the libraries, the kind of device
    and the dtype; never of a path or a name.

    Whoever can write to the folder can choose the schemes of a model. So it is made for this user
    alone (0700), and is not used if it belongs to another user or if others can write to it.

    :param folder: of the files; created when the first is written
    :param model: its parameters, buffers and config count, by content
    :param batches: what is measured on
    :param layers: names of all layers that are measured
    :param settings: whatever else the scores depend on
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        batches: Iterable[dict[str, Any]],
        layers: Iterable[str],
        settings: dict[str, Any],
    ):
        self.folder = folder
        self.layers = list(layers)
        facts = [_computation(model), self.layers, settings]
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode())
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
        """
        :return: score of each layer that data reached, by name; None if they are not known, or
            cannot be trusted or read, with a warning
        """
        path = self._path(scheme)
        try:
            if not path.exists():
                return None
            for place in (self.folder, path):
                reason = not_private_reason(place)
                if reason is not None:
                    logger.warning(f"scores are measured again: {reason}")
                    return None
            return self._checked(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            logger.warning(f"{path} cannot be read, so its scores are measured again: {error}")
            return None

    def keep(self, scheme: QuantizationScheme, scores: dict[str, float]) -> None:
        """
        Write scores down; where that fails, say so and go on.

        :param scores: finite; layers that no data reached are missing
        """
        content = {name: scores.get(name) for name in self.layers}
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            reason = not_private_reason(self.folder)
            if reason is not None:
                logger.warning(f"the scores are not kept for another run: {reason}")
                return
            write_atomically(self._path(scheme), json.dumps(content, indent=1) + "\n")
        except OSError as error:
            logger.warning(f"the scores are not kept for another run: {error}")

    def _checked(self, content: Any) -> dict[str, float]:
        """:raises ValueError: if a layer is missing or unknown, or a score is not a number"""
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
        different = set(content).symmetric_difference(self.layers)
        if different:
            raise ValueError(f"it is of other layers: {sorted(different)[0]} is in one only")
        for name, score in content.items():
            if score is not None and not _is_finite_number(score):
                raise ValueError(f"the score of {name} is {score!r}")
        return {name: float(score) for name, score in content.items() if score is not None}

    def _path(self, scheme: QuantizationScheme) -> Path:
        content = scheme.model_dump_json(exclude={"targets"})
        name = hashlib.blake2b(content.encode(), key=self._key, digest_size=16).hexdigest()
        return self.folder / f"{name}.json"


def _computation(model: nn.Module) -> dict[str, Any]:
    """:return: by what, on what and in what scores are computed; JSON values"""
    modules = [module for module in model.modules() if module._parameters]
    return {
        "autoround_modifier": [__version__, source_digest(*COMPUTING_ROOMS)],
        "libraries": library_versions(),
        "devices": sorted({torch.device(get_execution_device(x)).type for x in modules}),
        "dtype": str(getattr(model, "dtype", None)),
    }


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count_in(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(content_key(value, None))
    else:
        digest.update(f"{name} {value}".encode())
