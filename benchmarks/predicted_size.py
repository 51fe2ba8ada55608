"""
The size of DeepSeek-R1's checkpoint under a recipe, before anything is downloaded.

    python benchmarks/predicted_size.py

The model is built on the meta device, so that no weight is allocated, and the recipe is resolved on
it as `AutoRoundModifier` resolves it. A layer's size is what compressed-tensors makes of a layer of
its shape (`saved_bits`). One expert of each block stands for all: they have one shape, and a target
that tells them apart is refused. The layer that predicts a second token, which Transformers does
not load, does not count.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

from autoround_modifier import AutoRoundModifier, load_recipe
from autoround_modifier.host.saved_size import saved_bits
from autoround_modifier.modifiers.routers import untargeted_routers
from autoround_modifier.modifiers.validation import resolve_schemes

# config.json of deepseek-ai/DeepSeek-R1 and DeepSeek-V3
DEEPSEEK_R1 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
RECIPE = "deepseek_r1_int2_mixed"
# The part of the model that a tensor belongs to: the first that its name matches
PARTS = {
    "routed experts": r"\.mlp\.experts\.",
    "shared experts": r"\.mlp\.shared_experts\.",
    "routers": r"\.mlp\.gate\.",
    "dense MLPs": r"\.mlp\.",
    "attention projections": r"\.self_attn\..*_proj",
    "embeddings": r"embed_tokens",
    "lm_head": r"lm_head",
    "norms": r"norm",
}
EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")


@dataclass
class Part:
    """
    Some tensors of a model.

    :ivar numbers: how many there are, parameters and saved buffers
    :ivar original: bytes in the original's dtype
    :ivar saved: bytes of the checkpoint
    :ivar schemes: how many weights have how many bits
    """

    numbers: int = 0
    original: int = 0
    saved: int = 0
    schemes: Counter[str] = field(default_factory=Counter)


def meta_model(config: DeepseekV3Config) -> nn.Module:
    """:return: the model on the meta device, bfloat16, with one linear expert in each mixture"""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
        for block in model.model.layers[config.first_k_dense_replace :]:
            expert = DeepseekV3MLP(config, config.moe_intermediate_size).to(torch.bfloat16)
            block.mlp.experts = nn.ModuleList([expert])
            bias = block.mlp.gate.e_score_correction_bias
            block.mlp.gate.e_score_correction_bias = bias.float()  # saved so
    return model


def predict(config: DeepseekV3Config, recipe: str) -> dict[str, Part]:
    """
    :param recipe: path, or name of a shipped recipe
    :return: what each of `PARTS` is made of
    """
    model = meta_model(config)
    (modifier,) = (x for x in load_recipe(recipe).modifiers if isinstance(x, AutoRoundModifier))
    quantization = modifier.resolved_config
    quantization.ignore = [*quantization.ignore, *untargeted_routers(model, quantization)]
    for group in quantization.config_groups.values():
        if any(re.search(r"experts\W+\d", target) for target in group.targets):
            raise SystemExit(f"{group.targets} tells one expert from another")
    schemes = resolve_schemes(model, quantization)

    parts = {name: Part() for name in PARTS}
    for name, tensor in model.state_dict().items():
        part = next(parts[key] for key, pattern in PARTS.items() if re.search(pattern, name))
        count = config.n_routed_experts if EXPERT.search(name) else 1
        owner, _, kind = name.rpartition(".")
        scheme = schemes[owner][1] if kind == "weight" and owner in schemes else None
        if scheme is None:
            saved, bits = tensor.nbytes, f"{8 * tensor.itemsize}"
        else:
            assert scheme.weights is not None
            saved = saved_bits(schemes[owner][0], scheme) // 8
            bits = f"{scheme.weights.num_bits}, groups of {scheme.weights.group_size}"
        part.numbers += count * tensor.numel()
        part.original += count * tensor.nbytes
        part.saved += count * saved
        part.schemes[bits] += count * tensor.numel()
    return parts


def markdown(parts: dict[str, Part]) -> str:
    lines = ["| part | parameters | bits | GB in bfloat16 | GB as saved |", "| --- " * 5 + "|"]
    total = Part()
    for name, part in parts.items():
        bits = part.schemes.most_common(1)[0][0]
        lines.append(
            f"| {name} | {part.numbers / 1e9:.3f} B | {bits} | {part.original / 1e9:.2f} "
            f"| {part.saved / 1e9:.2f} |"
        )
        total.numbers += part.numbers
        total.original += part.original
        total.saved += part.saved
    lines.append(
        f"| all | {total.numbers / 1e9:.3f} B | {8 * total.saved / total.numbers:.3f} in the mean "
        f"| {total.original / 1e9:.2f} | {total.saved / 1e9:.2f} |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--recipe", default=RECIPE)
    print(markdown(predict(DeepseekV3Config(**DEEPSEEK_R1), parser.parse_args().recipe)))


if __name__ == "__main__":
    main()
