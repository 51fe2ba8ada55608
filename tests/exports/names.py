"""
Which layers vLLM is to take for quantized: configs of the exporters for names of layers alone, in
cases that no tiny checkpoint has.
"""

from __future__ import annotations

from typing import Any

from export_sources import spec

from autoround_modifier.exports.auto_round_format import auto_round_config
from autoround_modifier.exports.awq import awq_config
from autoround_modifier.exports.gptq import gptq_config

FORMATS = {"gptq": gptq_config, "awq": awq_config, "auto_round": auto_round_config}
BLOCKS, TEXT = "model.layers", "model.language_model.layers"
VISION = "model.vision_tower.encoder.layers"


def in_blocks(blocks: str, *names: str) -> list[str]:
    return [f"{blocks}.{number}.{name}" for number in range(2) for name in names]


ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Quantized layers, others, and how vLLM calls some of them: whether each is quantized
CASES: dict[str, tuple[list[str], list[str], dict[str, bool]]] = {
    "attention": (
        in_blocks(BLOCKS, *ATTENTION),
        [*in_blocks(BLOCKS, *MLP), "lm_head"],
        {
            f"{BLOCKS}.0.self_attn.qkv_proj": True,
            f"{BLOCKS}.1.self_attn.o_proj": True,
            f"{BLOCKS}.0.mlp.gate_up_proj": False,
            f"{BLOCKS}.1.mlp.down_proj": False,
        },
    ),
    "one block": (
        [name for name in in_blocks(BLOCKS, *ATTENTION, *MLP) if ".1." in name],
        [name for name in in_blocks(BLOCKS, *ATTENTION, *MLP) if ".0." in name],
        {
            f"{BLOCKS}.0.self_attn.qkv_proj": False,
            f"{BLOCKS}.1.self_attn.qkv_proj": True,
            f"{BLOCKS}.0.mlp.down_proj": False,
            f"{BLOCKS}.1.mlp.gate_up_proj": True,
        },
    ),
    "experts left alone": (
        in_blocks(BLOCKS, *ATTENTION),
        in_blocks(BLOCKS, "mlp.experts", "mlp.gate"),
        {
            f"{BLOCKS}.1.self_attn.qkv_proj": True,
            f"{BLOCKS}.1.mlp.gate": False,
            f"{BLOCKS}.1.mlp.experts": False,
        },
    ),
    "vision": (
        in_blocks(TEXT, *ATTENTION),
        in_blocks(VISION, *ATTENTION),
        {
            f"{TEXT}.1.self_attn.qkv_proj": True,
            f"{VISION}.1.self_attn.qkv_proj": False,
            f"{VISION}.1.self_attn.o_proj": False,
        },
    ),
}


def name_cases() -> list[dict[str, Any]]:
    """:return: JSON values, read by ``test_vllm.py``"""
    return [
        {
            "name": f"{format}-{name}",
            "config": config([spec(name=layer) for layer in quantized], skipped),
            "files": quantized,
            "layers": layers,
        }
        for name, (quantized, skipped, layers) in CASES.items()
        for format, config in FORMATS.items()
    ]
