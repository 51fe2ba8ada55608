"""
The format of auto-round: tensors of a layer, and the config.

They are those of GPTQ without ``g_idx``, or those of AWQ. Each entry of ``extra_config`` has
``bits``: vLLM takes a layer whose entry has none for one of 16 bits. ``sym`` is one for all layers:
it says how zero points are stored, which is the same in all of them, and layers that engines fuse
must agree in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from autoround_modifier.checkpoints.saved_layers import HEADS
from autoround_modifier.exports.awq import awq_tensors
from autoround_modifier.exports.gptq import gptq_tensors
from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.exports.layer_names import (
    block_lists,
    expressions,
    is_experts,
    most_common_scheme,
)
from autoround_modifier.version import __version__

__all__ = ["auto_round_config", "auto_round_notes", "auto_round_tensors", "packing_format"]

GPTQ_V1 = "auto_round:auto_gptq"  # zero points stored less one
GPTQ_V2 = "auto_round"
AWQ = "auto_round:auto_awq"


def packing_format(specs: Sequence[IntegerSpec]) -> str:
    """:return: which tensors the checkpoint has; the same for all layers"""
    if all(spec.symmetric for spec in specs):
        return GPTQ_V1
    return AWQ if all(spec.num_bits == 4 for spec in specs) else GPTQ_V2


def auto_round_tensors(layer: IntegerLayer, packing: str) -> dict[str, Tensor]:
    """
    :param layer: with numbers of features that are multiples of 32
    :param packing: see `packing_format`
    :return: see `gptq_tensors` and `awq_tensors`
    """
    if packing == AWQ:
        return awq_tensors(layer)
    tensors = gptq_tensors(layer, v1=packing == GPTQ_V1)
    del tensors["g_idx"]
    return tensors


def auto_round_config(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> dict[str, Any]:
    """
    :param specs: of the quantized layers
    :param skipped: layers that are not quantized
    :return: ``quantization_config`` of ``config.json``
    """
    bits, group_size = most_common_scheme(specs)
    symmetric = all(spec.symmetric for spec in specs)
    blocks = block_lists(spec.name for spec in specs)
    extra: dict[str, dict[str, Any]] = {
        spec.name: {
            "bits": spec.num_bits,
            "group_size": spec.group_size,
            "sym": symmetric,
            "data_type": "int",
        }
        for spec in specs
        if (spec.num_bits, spec.group_size) != (bits, group_size)
    }
    left_out = _left_out(skipped, [spec.name for spec in specs])
    extra |= {key: {"bits": 16, "data_type": "float"} for key in left_out}
    config = {
        "quant_method": "auto-round",
        "packing_format": packing_format(specs),
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "data_type": "int",
        "block_name_to_quantize": ",".join(blocks),
        "quantizer": f"autoround_modifier:{__version__}",
    }
    return {**config, "extra_config": extra} if extra else config


def _left_out(skipped: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """
    vLLM looks for the name of a module of experts, auto-round for those of the layers in it. Where
    auto-round finds no linear layer of a name, it takes the name for an expression, which may match
    a part of another.

    :return: names and expressions of what is not quantized; heads are not by default
    """
    keys = []
    for name in skipped:
        if name.rpartition(".")[2] in HEADS:
            continue
        part_of_another = any(name in other for other in quantized)
        keys.append(f"^{re.escape(name)}$" if part_of_another else name)
    return [*keys, *expressions([x for x in skipped if is_experts(x)], quantized)]


def auto_round_notes(specs: Sequence[IntegerSpec]) -> list[str]:
    """:return: which loaders do not take the exported checkpoint, and why"""
    if packing_format(specs) != GPTQ_V2:
        return []
    return [
        "layers with zero points and other than 4 bits are packed as `auto_round`: Transformers "
        "with auto-round reads that, vLLM on CPUs does not"
    ]
