"""What a ``config.json`` must be so that its sections can be read. Without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoround_modifier.errors import CheckpointError

__all__ = ["check_config"]

QUANTIZATION = ("quantization_config", "compression_config")


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """
    :param config: content of a ``config.json``
    :param path: of the file, for the message
    :return: the same
    :raises CheckpointError: if it is no JSON object, or a section of it that is read is none
    """
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    for name, section in _sections(config):
        if section is not None and not isinstance(section, dict):
            raise CheckpointError(f"{path}: {name} is no JSON object")
    return config


def _sections(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values: the part about text, and how both parts are quantized."""
    text = config.get("text_config")
    yield "`text_config`", text
    for part in (config, text or {}):
        for name in QUANTIZATION:
            quantization = part.get(name)
            yield f"`{name}`", quantization
            groups = (quantization or {}).get("config_groups")
            if groups:  # some writers leave an empty list
                yield f"`config_groups` of `{name}`", groups
                for group, scheme in groups.items():
                    yield f"`{group}` of `config_groups`", [] if scheme is None else scheme
                    for entry in ("weights", "input_activations"):
                        yield f"`{entry}` of `{group}`", scheme.get(entry)
