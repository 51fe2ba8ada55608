"""Linear layers that engines fuse into one, and that therefore need one scheme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["FUSED_NAMES", "LOOKED_UP", "fused_names", "fused_parts"]

# What vLLM 0.32 calls the fused layer, and its parts: `packed_modules_mapping` of its models.
FUSED_NAMES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkvb_proj": ("q_proj", "k_proj", "v_proj", "b_proj"),
    "in_proj_qkvg": ("q_proj", "k_proj", "v_proj", "g_proj"),
    "qkv": ("query", "key", "value"),
    "merged_qkv": ("wq", "wk", "wv"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "wk_weights_proj": ("wk", "weights_proj"),
    "w13": ("w1", "w3"),
    "fc13": ("fc1", "fc3"),
    "c_fc": ("c_fc_0", "c_fc_1"),
    "fused_wqa_wkv": ("wq_a", "wkv"),
}
# Which of them SGLang 0.5.23 looks for by this name, where its class says nothing of the parts
LOOKED_UP = ("qkv_proj", "gate_up_proj")
# Which of them a module that has the parts does not always fuse
_SOMETIMES = ("qkvb_proj", "in_proj_qkvg", "wk_weights_proj", "fc13", "fused_wqa_wkv")


def fused_names(name: str) -> list[str]:
    """
    :param name: of a layer
    :return: names of the layers into which vLLM may fuse it, as far as its own name tells
    """
    stem, _, leaf = name.rpartition(".")
    prefix = f"{stem}." if stem else ""
    return [f"{prefix}{fused}" for fused, parts in FUSED_NAMES.items() if leaf in parts]


def fused_parts(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """
    Yield what is fused, as ``model.layers.0.self_attn.qkv_proj``, and its layers, if there are
    several: what every model of vLLM that has them fuses.
    """
    by_parent: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, set()).add(leaf)
    for parent, leaves in by_parent.items():
        found: dict[str, list[str]] = {}
        for fused, parts in FUSED_NAMES.items():
            if fused in _SOMETIMES:
                continue
            present = [part for part in parts if part in leaves]
            if len(present) > 1 and present not in found.values():
                found[fused] = present
        for fused, present in found.items():
            prefix = f"{parent}." if parent else ""
            yield f"{prefix}{fused}", [f"{prefix}{part}" for part in present]
