"""
The format of GPTQ: tensors of a layer, and the config.

Which layers are quantized stands in the config twice. Transformers 5.24 with optimum 2.3 reads
``modules_in_block_to_quantize``, and compares the ends of names; it ignores ``dynamic``. GPTQModel
7.7 and SGLang 0.5.23 read ``dynamic`` alone, and match its expressions from the beginning of a
name; SGLang asks it nothing about experts. vLLM 0.32 quantizes what both name; without the first,
what the files hold as integers.

``sym`` is one for all layers: readers of zero points compute symmetric weights as well, and those
that take symmetric weights alone (vLLM, SGLang) refuse the others by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.checkpoints.saved_layers import HEADS
from autoround_modifier.errors import listed
from autoround_modifier.exports.bit_stream import pack_rows
from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.exports.layer_names import (
    block_lists,
    expressions,
    is_experts,
    most_common_scheme,
    names_in_each_block,
    with_fused,
)
from autoround_modifier.version import __version__

__all__ = ["gptq_config", "gptq_notes", "gptq_tensors", "gptq_v1"]


def gptq_v1(specs: Sequence[IntegerSpec]) -> bool:
    """
    :return: whether zero points are stored less one, as in the first version of the format, which
        cannot hold zero points of 0
    """
    return all(spec.symmetric for spec in specs)


def gptq_tensors(layer: IntegerLayer, v1: bool) -> dict[str, Tensor]:
    """
    :param layer: with numbers of features that are multiples of 32
    :param v1: store zero points less one; needs zero points of 1 or more
    :return: ``qweight``, (in_features * num_bits / 32, out_features), int32, packed along the input
        features; ``qzeros``, (groups, out_features * num_bits / 32), int32, packed along the output
        features; ``scales``, (groups, out_features), float16; ``g_idx``, (in_features,), int32: the
        group of each input feature
    """
    spec = layer.spec
    zeros = layer.zero_point - 1 if v1 else layer.zero_point
    groups = torch.arange(spec.in_features) // spec.features_per_scale
    return {
        "qweight": pack_rows(layer.codes, spec.num_bits).T.contiguous(),
        "qzeros": pack_rows(zeros.T.contiguous(), spec.num_bits),
        "scales": layer.scale.to(torch.float16).T.contiguous(),
        "g_idx": groups.to(torch.int32),
    }


def gptq_config(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> dict[str, Any]:
    """
    :param specs: of the quantized layers
    :param skipped: layers that are not quantized
    :return: ``quantization_config`` of ``config.json``, and the content of ``quantize_config.json``
    """
    bits, group_size = most_common_scheme(specs)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": all(spec.symmetric for spec in specs),
        "lm_head": False,
        "checkpoint_format": "gptq" if gptq_v1(specs) else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"autoround_modifier:{__version__}"]},
    }
    quantized = with_fused([spec.name for spec in specs])
    left_out = with_fused(_no_heads(skipped))
    dynamic: dict[str, Any] = {
        f"-:{expression}": {} for expression in expressions(left_out, quantized)
    }
    by_scheme: dict[tuple[int, int], list[str]] = {}
    for spec in specs:
        by_scheme.setdefault((spec.num_bits, spec.group_size), []).append(spec.name)
    for (other_bits, other_size), names in by_scheme.items():
        if (other_bits, other_size) != (bits, group_size):
            own = with_fused(names)
            others = {*quantized, *left_out}.difference(own)
            dynamic |= {
                f"+:{expression}": {"bits": other_bits, "group_size": other_size}
                for expression in expressions(own, others)
            }
    if dynamic:
        config["dynamic"] = dynamic
    inside = names_in_each_block([spec.name for spec in specs], skipped)
    if _in_blocks(specs, skipped) and inside is not None:
        config["modules_in_block_to_quantize"] = [inside]
    return config


def gptq_notes(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> list[str]:
    """:return: which loaders do not take the exported checkpoint, and why"""
    notes = []
    names = [spec.name for spec in specs]
    if len({(spec.num_bits, spec.group_size) for spec in specs}) > 1:
        notes.append(
            "layers have different bits or group sizes (`dynamic`): GPTQModel and vLLM read them, "
            "Transformers does not; `auto_round` holds them for Transformers"
        )
    elif _in_blocks(specs, skipped) and names_in_each_block(names, skipped) is None:
        notes.append(
            "other layers are quantized in one block than in another (`dynamic`): GPTQModel and "
            "vLLM read that, Transformers does not; `auto_round` holds it for Transformers"
        )
    taken = _taken_by_transformers(specs, skipped)
    if taken:
        notes.append(f"Transformers would take {listed(taken)} for quantized, and not load them")
    if any(map(is_experts, skipped)):
        notes.append("SGLang takes experts that are not quantized, as here, for quantized")
    if any(spec.num_bits not in (4, 8) or not spec.symmetric for spec in specs):
        notes.append(
            "vLLM and SGLang take GPTQ with 4 or 8 bits, symmetric, by default; other layers of "
            "this checkpoint need `--quantization humming` there, or Transformers with GPTQModel"
        )
    return notes


def _taken_by_transformers(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> list[str]:
    """:return: layers that are not quantized, whose names end with that of one inside a block"""
    inside = names_in_each_block([spec.name for spec in specs], skipped) or ()
    return [name for name in _in_blocks(specs, skipped) if name.endswith(tuple(inside))]


def _in_blocks(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> list[str]:
    """:return: layers that are not quantized beside ones that are, below the same module list"""
    lists = block_lists(spec.name for spec in specs)
    return [name for name in skipped if set(block_lists([name])) & set(lists)]


def _no_heads(names: Sequence[str]) -> list[str]:
    """:return: the names without heads, which no loader of the format quantizes by default"""
    return [name for name in names if name.rpartition(".")[2] not in HEADS]
