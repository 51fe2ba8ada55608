"""What ``config.json`` of a saved checkpoint says, where the model is not what it is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "COMPRESSED_TENSORS",
    "QUANTIZED_CACHE",
    "beside_weights",
    "changed_fields",
    "quantization_of",
    "text_part",
    "with_changes",
]

COMPRESSED_TENSORS = "compressed-tensors"
QUANTIZED_CACHE = "the key-value cache is quantized"

# Fields that are LLM-Compressor's to write, or that say nothing of the model
NOT_OF_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "quantization_config",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
    }
)


def text_part(config: Mapping[str, Any]) -> Any:
    """:return: the part of a config that is about the decoder of text; often all of it"""
    return config.get("text_config") or config.get("llm_config") or config


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """:return: the quantization section of a config, or of its part about text; None without one"""
    for part in (config, text_part(config)):
        if part.get("quantization_config"):
            return dict(part["quantization_config"])
        if part.get("compression_config"):  # as compressed-tensors once called it
            return {"quant_method": COMPRESSED_TENSORS, **part["compression_config"]}
    return None


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param before: a config, as it was loaded
    :param after: the same, as it is now
    :return: the fields that differ, with their values of now; of nested configs only what differs
    """
    changes: dict[str, Any] = {}
    for name, value in after.items():
        old = before.get(name)
        if name in NOT_OF_THE_MODEL or value == old:
            continue
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = changed_fields(old, value)
            if inner:
                changes[name] = inner
        else:
            changes[name] = value
    return changes


def with_changes(
    config: Mapping[str, Any], changes: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """
    :param config: ``config.json``
    :param changes: `changed_fields`
    :param aliases: other names of fields (``attribute_map`` of the config's class)
    :return: the config with the changes, each under the name that it has there
    """
    result = dict(config)
    for name, value in changes.items():
        known = [name, *(alias for alias, real in aliases.items() if real == name)]
        key = next((one for one in known if one in config), name)
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping):
            result[key] = with_changes(config[key], value, {})
        else:
            result[key] = value
    return result


def beside_weights(quantization: Mapping[str, Any]) -> dict[str, str]:
    """
    :param quantization: `quantization_of` a config
    :return: what it asks for beside quantized layers, in words -> the field that does
    """
    found = {}
    if quantization.get("kv_cache_scheme"):
        found[QUANTIZED_CACHE] = "kv_cache_scheme"
    if quantization.get("transform_config"):
        found["weights are rotated while the model runs"] = "transform_config"
    if (quantization.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        found["weights are stored sparsely"] = "sparsity_config"
    return found
