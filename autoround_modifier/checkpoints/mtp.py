"""
Layers for multi-token prediction (MTP), with which engines draft several tokens at once.
Transformers does not load them: they are in the released files alone, as ``mtp.*`` or as decoder
layers after the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from autoround_modifier.checkpoints.saved_config import text_part

__all__ = [
    "MTP_FIELDS",
    "mtp_expressions",
    "mtp_names",
    "promised_mtp_layers",
    "renumbered",
    "with_mtp_layers",
]

# Fields that say how many there are: DeepSeek and GLM; Transformers; Qwen3.5
MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# A part of the name as in `mtp.fc`, `model.mtp.layers.0`, `model.mtp_block.0` (Ernie 4.5)
MTP_PART = re.compile(r"(?:^|\.)mtp(?:_\w+)?(?:\.|$)")
DECODER_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?layers)\.(?P<index>\d+)\.")
NOT_TEXT = re.compile(r"vis|audio|encoder")


def promised_mtp_layers(config: Mapping[str, Any]) -> int:
    """:return: how many a config says that there are"""
    parts = (config, text_part(config))
    return max(int(part.get(field) or 0) for part in parts for field in MTP_FIELDS)


def mtp_names(
    names: Iterable[str],
    num_layers: int | None,
    promised: bool,
    ignored_on_load: Iterable[str] = (),
) -> list[str]:
    """
    :param names: of the tensors in a release
    :param num_layers: of its decoder, without those for MTP
    :param promised: whether the config says that it has some
    :param ignored_on_load: expressions of names that the model's class does not load
    :return: the tensors of layers for MTP
    """
    names, ignored = list(names), [re.compile(one) for one in ignored_on_load]
    prefixes = {found["prefix"] for name in names if (found := DECODER_LAYER.match(name))}
    decoders = {
        prefix
        for prefix in prefixes
        if num_layers is not None
        and not NOT_TEXT.search(prefix)
        and any(name.startswith(f"{prefix}.{num_layers - 1}.") for name in names)
    }

    def is_mtp(name: str) -> bool:
        if MTP_PART.search(name):
            return True
        found = DECODER_LAYER.match(name)
        if found is None or found["prefix"] not in decoders:
            return False
        return int(found["index"]) >= (num_layers or 0) and (
            promised or any(one.search(name) for one in ignored)
        )

    return [name for name in names if is_mtp(name)]


def renumbered(name: str, num_layers: int | None, own_layers: int | None) -> str:
    """
    Engines look for layers for MTP right after the last one of the decoder.

    :param num_layers: of the source's decoder
    :param own_layers: of the saved model's decoder
    :return: the name that a tensor of a layer for MTP has in the saved model
    """
    found = DECODER_LAYER.match(name)
    if found is None or num_layers is None or own_layers is None or MTP_PART.search(name):
        return name
    index = int(found["index"]) - num_layers + own_layers
    return f"{found['prefix']}.{index}.{name[found.end() :]}"


def mtp_expressions(names: Iterable[str]) -> list[str]:
    """
    :param names: of tensors of layers for MTP
    :return: expressions for ``ignore`` that match all layers in them
    """
    roots = set()
    for name in names:
        part = MTP_PART.search(name)
        if part is not None:
            roots.add(name[: part.start()] + part.group().rstrip("."))
        else:
            found = DECODER_LAYER.match(name)
            assert found is not None
            roots.add(found.group().rstrip("."))
    return [f"re:^{re.escape(root)}\\..*" for root in sorted(roots)]


def with_mtp_layers(config: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """
    :param config: ``config.json``
    :param count: of layers for MTP; None leaves the fields as they are
    :return: the config, with that number in the fields that it has
    """
    result = dict(config)
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), Mapping):
            result[key] = with_mtp_layers(config[key], count)
    if count is not None:
        result |= {field: count for field in MTP_FIELDS if field in config}
    return result
