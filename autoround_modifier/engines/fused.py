"""Linear layers that engines fuse into one, and that therefore need one scheme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["FUSED_NAMES", "fused_name", "fused_parts"]

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


def fused_name(name: str) -> str | None:
    """
    :param name: of a layer
    :return: that of the layer into which vLLM may fuse it: q/k/v, gate/up; None for others
    """
    stem, _, leaf = name.rpartition(".")
    for fused in ("qkv_proj", "gate_up_proj"):
        if leaf in FUSED_NAMES[fused]:
            return f"{stem}.{fused}" if stem else fused
    return None


def fused_parts(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield what is fused, as ``model.layers.0.self_attn.qkv_proj``, and its layers, if several."""
    by_parent: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, set()).add(leaf)
    for parent, leaves in by_parent.items():
        found: dict[str, list[str]] = {}
        for fused, parts in FUSED_NAMES.items():
            present = [part for part in parts if part in leaves]
            if len(present) > 1 and present not in found.values():
                found[fused] = present
        for fused, present in found.items():
            prefix = f"{parent}." if parent else ""
            yield f"{prefix}{fused}", [f"{prefix}{part}" for part in present]
