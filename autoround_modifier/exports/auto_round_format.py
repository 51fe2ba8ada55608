"""
The format of auto-round: tensors of a layer, and the config.

They are those of GPTQ without ``g_idx``, or those of AWQ. Each entry of ``extra_config`` has
``bits``: vLLM takes a layer whose entry has none for one of 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from autoround_modifier.checkpoints.saved_layers import HEADS
from autoround_modifier.exports.awq import awq_tensors
from autoround_modifier.exports.gptq import gptq_tensors
from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.exports.layer_names import block_lists, most_common_scheme
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
    extra |= {
        name: {"bits": 16, "data_type": "float"}
        for name in skipped
        if name.rpartition(".")[2] not in HEADS
    }
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


def auto_round_notes(specs: Sequence[IntegerSpec]) -> list[str]:
    """:return: which loaders do not take the exported checkpoint, and why"""
    if packing_format(specs) != GPTQ_V2:
        return []
    return [
        "layers with zero points and other than 4 bits are packed as `auto_round`: Transformers "
        "with auto-round reads that, vLLM on CPUs does not"
    ]
