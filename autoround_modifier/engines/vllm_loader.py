"""
The rules by which vLLM 0.32 reads a compressed-tensors checkpoint, on names and shapes alone.

Rewritten from ``vllm/model_executor/layers/quantization/compressed_tensors``: `get_scheme_dict`,
`should_ignore_layer`, `find_matched_target` and `CompressedTensorsMoEMethod.get_moe_method`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from autoround_modifier.engines.config_names import EXPERT, HEADS
from autoround_modifier.engines.fused import fused_names, fused_parts
from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.engines.matching import Names, Targets, groups_of
from autoround_modifier.engines.problem import Problem

__all__ = ["vllm_experts", "vllm_problems"]

NAME = "vLLM"
OR_ELSE = "Or set `engine: transformers`, if the checkpoint is not for vLLM."
# Weight matrices that vLLM does not make quantized, whatever the config says: embeddings, heads,
# and routers of experts
_NEVER_QUANTIZED = re.compile(
    r"(^|.*\.)(\w*embed\w*|wte|wpe|shared|lm_head|relative_attention_bias|router|gate"
    r"|shared_expert_gate|\w*norm\w*)(\.\w+)?"
)
# Model types whose own class in vLLM reads experts from fused tensors, and skips others silently
_FUSED_EXPERTS_ONLY = ("gpt_oss", "dbrx")
# Model types whose state-space layers are those of Mamba 1 -> what these are called
_MAMBA_1 = {"jamba": "mamba", "mamba": "mixer", "falcon_mamba": "mixer"}
# Model types whose vision attention vLLM makes of plain linear layers, which have 16-bit weights
# only: `InternSdpaAttention` of interns1_vit.py
_PLAIN_VISION_ATTENTION = ("internvl", "interns1")
_VISION_ATTENTION = re.compile(
    r"(.*\.)?vision_tower\..*\.attention\.(q_proj|k_proj|v_proj|projection_layer)"
)


def vllm_problems(layout: CheckpointLayout) -> list[Problem]:
    """
    :param layout: of a checkpoint that was or will be saved
    :return: why vLLM will refuse it, or read it as another model
    """
    if not layout.quantization.get("config_groups"):
        return []
    layers = _layers(layout)
    return [
        *_fused_problems(layers),
        *_group_problems(layers, layout),
        *_expert_problems(layers, layout),
        *_mamba_problems(layers, layout),
        *_vision_problems(layers, layout),
    ]


def vllm_experts(group: Mapping[str, Any]) -> Problem | None:
    """
    :param group: config group of experts
    :return: what vLLM cannot do with it; None if it has kernels for it
    """
    weights, inputs = group["weights"], group.get("input_activations")
    what = remedy = None
    if weights is None:
        return None
    if weights["type"] == "float":
        if inputs is None and weights["num_bits"] == 8 and not _is_power_of_two(weights):
            what = "has no FP8 experts with 16-bit activations"
            remedy = "Quantize their activations as well (FP8_DYNAMIC), or use W8A16 for them."
    elif inputs is not None and inputs["type"] == "int":
        if weights["num_bits"] < 8 and group.get("format") not in (None, "int-quantized"):
            what = "has no packed experts with 8-bit activations"
            remedy = "Use W4A16 or W8A8 for them."
        elif weights["num_bits"] == 8 and not inputs.get("dynamic"):
            what = "has no W8A8 experts with static scales of activations"
            remedy = "Use dynamic ones."
    return None if what is None else Problem(NAME, what, (), f"{remedy} {OR_ELSE}")


def _is_power_of_two(weights: Mapping[str, Any]) -> bool:
    return str(weights.get("scale_dtype")).endswith("uint8")


def _layers(layout: CheckpointLayout) -> dict[str, str | None]:
    """
    :return: layer -> config group by which vLLM reads it; None for 16 bits. Embeddings, heads and
        routers are left out where they are not quantized
    """
    targets = Targets(groups_of(layout.quantization))
    ignore = Names(layout.quantization.get("ignore") or [])
    found: dict[str, str | None] = {}
    for tensor, x in layout.tensors.items():
        name, _, part = tensor.rpartition(".")
        if part not in ("weight", "weight_packed") or len(x.shape) != 2:
            continue
        if f"{name}.weight_scale" in layout.tensors or not _NEVER_QUANTIZED.fullmatch(name):
            ignored = any(known in ignore for known in (*fused_names(name), name))
            found[name] = None if ignored else _group(targets.vllm, name)
    return found


def _group(rule: Callable[[str, str], str | None], name: str) -> str | None:
    """:return: what a rule says; the files do not tell whether it is an embedding"""
    if _leaf(name) in HEADS:
        return rule(name, "Head")
    return rule(name, "Linear") or rule(name, "Embedding")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _fused_problems(layers: Mapping[str, str | None]) -> Iterator[Problem]:
    different = [
        (fused, parts)
        for fused, parts in fused_parts(name for name in layers if not EXPERT.search(name))
        if len({layers[part] for part in parts}) > 1
    ]
    if different:
        first = ", ".join(part.rpartition(".")[2] for part in different[0][1])
        yield Problem(
            NAME,
            f"fuses {first} into one layer, which has one scheme; here they have several, or not "
            "all of them are quantized",
            tuple(fused for fused, _ in different),
            f"Give them one scheme, or put all of them into `ignore`. {OR_ELSE}",
        )


def _group_problems(
    layers: Mapping[str, str | None], layout: CheckpointLayout
) -> Iterator[Problem]:
    targets = Targets(groups_of(layout.quantization))
    unread, plain, other = [], [], []
    quantized = {_leaf(x) for x in layers if f"{x}.weight_scale" in layout.tensors}
    for name, group in layers.items():
        if EXPERT.search(name):
            continue
        if f"{name}.weight_scale" not in layout.tensors:
            if group is not None and _leaf(name) in quantized:  # others may be no linear layers
                plain.append(name)
        elif group is None:
            unread.append(name)
        elif group != _group(targets.compressed_tensors, name):
            other.append(name)
    for names, what, remedy in (
        (unread, "takes quantized layers for layers in 16 bits", "Name them in `targets`."),
        (plain, "takes layers in 16 bits for quantized ones", "Name them in `ignore`."),
        (
            other,
            "takes the first target that matches a layer, and gives these another scheme",
            "Write targets of which one matches each layer.",
        ),
    ):
        if names:
            yield Problem(NAME, what, tuple(names), f"{remedy} {OR_ELSE}")


def _expert_problems(
    layers: Mapping[str, str | None], layout: CheckpointLayout
) -> Iterator[Problem]:
    by_block: dict[str, set[str | None]] = {}
    unread = []
    for name, group in layers.items():
        match = EXPERT.search(name)
        if match is not None:
            quantized = f"{name}.weight_scale" in layout.tensors
            read = group if quantized else None
            by_block.setdefault(name[: match.start() - 1], set()).add(read)
            if quantized and group is None:
                unread.append(name)
    mixed = [block for block, groups in by_block.items() if len(groups) > 1]
    if mixed:
        yield Problem(
            NAME,
            "computes the experts of a block by one scheme, and these have several, or are not all "
            "quantized",
            tuple(mixed),
            f"Give all layers of the experts of a block one scheme. {OR_ELSE}",
        )
    if unread and not mixed:
        yield Problem(
            NAME,
            "takes quantized experts for experts in 16 bits",
            tuple(unread),
            f"Name them in `targets`, and not in `ignore`. {OR_ELSE}",
        )
    used = {group for groups in by_block.values() for group in groups if group is not None}
    for group in sorted(used):
        problem = vllm_experts(layout.quantization["config_groups"][group])
        if problem is not None:
            yield replace(problem, names=tuple(by_block))
    if used and layout.config.get("model_type") in _FUSED_EXPERTS_ONLY:
        yield Problem(
            NAME,
            "skips experts that are saved one by one, without a message, in its own class of this "
            'architecture, and refuses them with `model_impl="transformers"`',
            tuple(by_block),
            "No engine that is known here reads them; set `engine: none` to quantize all the same.",
        )


def _mamba_problems(
    layers: Mapping[str, str | None], layout: CheckpointLayout
) -> Iterator[Problem]:
    mixer = _MAMBA_1.get(str(layout.config.get("model_type")))
    names = [
        name for name in layers if f".{mixer}." in name and f"{name}.weight_scale" in layout.tensors
    ]
    if names:
        yield Problem(
            NAME,
            "has the linear layers of Mamba 1 in 16 bits only",
            tuple(names),
            rf"Put `re:.*\.{mixer}\..*` into `ignore`. {OR_ELSE}",
        )


def _vision_problems(
    layers: Mapping[str, str | None], layout: CheckpointLayout
) -> Iterator[Problem]:
    if layout.config.get("model_type") not in _PLAIN_VISION_ATTENTION:
        return
    names = [
        name
        for name in layers
        if _VISION_ATTENTION.fullmatch(name) and f"{name}.weight_scale" in layout.tensors
    ]
    if names:
        yield Problem(
            NAME,
            "has the attention of this vision tower in 16 bits only",
            tuple(names),
            rf"Put `re:.*vision_tower\..*\.attention\..*` into `ignore`. {OR_ELSE}",
        )
