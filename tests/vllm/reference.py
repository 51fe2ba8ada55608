"""What step 1 wrote beside a checkpoint: Transformers' answers, to hold the engine's against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Reference:
    """
    One checkpoint computed in one dtype.

    :param prompts: token ids
    :param logprobs: per prompt, of each token after the first given the tokens before it
    :param continuations: per prompt, the greedy tokens
    :param margins: per greedy token, by how much it beats the second best
    :param weights: dequantized, by module name
    """

    prompts: list[list[int]]
    logprobs: list[list[float]]
    continuations: list[list[int]]
    margins: list[list[float]]
    weights: dict[str, torch.Tensor]

    @classmethod
    def load(cls, directory: Path, dtype: str) -> Reference:
        prompts = json.loads((directory / "reference.json").read_text())[dtype]
        return cls(
            prompts=[prompt["token_ids"] for prompt in prompts],
            logprobs=[prompt["logprobs"] for prompt in prompts],
            continuations=[prompt["continuation"] for prompt in prompts],
            margins=[prompt["margins"] for prompt in prompts],
            weights=load_file(directory / f"weights_{dtype}.safetensors"),
        )

    def blocks(self) -> set[int]:
        """:return: the decoder blocks whose weights are here"""
        return {int(name.split(".")[2]) for name in self.weights}

    def fused_weight(self, name: str) -> torch.Tensor:
        """:return: the weight of a layer as vLLM names it, shape [out, in]"""
        block, projection = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
        parts = FUSED.get(projection, (projection,))
        return torch.cat([self.weights[f"{block}.{part}"] for part in parts])


def gaps(
    ours: list[list[float]], theirs: list[list[float]], left_out: float = 0
) -> tuple[float, float]:
    """
    :param left_out: share of all tokens, those with the largest differences, that do not count
    :return: mean and maximum absolute difference over all tokens of all prompts
    """
    differences = sorted(
        abs(a - b)
        for prompt_a, prompt_b in zip(ours, theirs, strict=True)
        for a, b in zip(prompt_a, prompt_b, strict=True)
    )
    differences = differences[: len(differences) - int(left_out * len(differences))]
    return sum(differences) / len(differences), differences[-1]
