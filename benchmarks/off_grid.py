"""
Write a checkpoint that computes the same, and whose weights are on no grid of GGUF.

    .venv/bin/python benchmarks/off_grid.py MODEL OUTPUT

The models of these benchmarks were in GGUF files once, so that their weights lie on the grid of
some type, and quantizing to that type again would cost nothing. Here each channel is multiplied by
a random factor, from 2^-0.5 to 2^0.5, and what reads it is divided by the factor: gains of norms
and the layers behind them, `up_proj` and `down_proj`, `v_proj` and `o_proj`. Factors differ within
each group of weights. Weights that are 0 stay 0. What is rounded to bfloat16 differs a little; the
written model is the one to compare with.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# Modules whose parameter `weight` is a gain minus 1
OFFSET_NORMS = {"Gemma3RMSNorm"}
TOKENIZER_FILES = "token*"


def factors(count: int, generator: torch.Generator) -> Tensor:
    """:return: (count,), float32, from 2^-0.5 to 2^0.5"""
    return torch.exp2(torch.rand(count, generator=generator) - 0.5)


def rescale_norm(norm: nn.Module, readers: list[nn.Linear], generator: torch.Generator) -> None:
    """Multiply the gain; divide the columns of the layers that read the norm's output."""
    factor = factors(norm.weight.numel(), generator)
    offset = 1.0 if type(norm).__name__ in OFFSET_NORMS else 0.0
    norm.weight.copy_((norm.weight + offset) * factor - offset)
    for layer in readers:
        layer.weight.div_(factor)


def rescale_pair(
    writer: nn.Linear, reader: nn.Linear, generator: torch.Generator, head_dim: int, repeats: int
) -> None:
    """
    Multiply the rows of a layer; divide the columns of the layer that reads them.

    :param head_dim: rows of ``writer`` that ``reader`` has ``repeats`` times, one after another
    """
    factor = factors(writer.out_features, generator)
    writer.weight.mul_(factor[:, None])
    read = factor.view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)
    reader.weight.div_(read)


@torch.no_grad()
def rescale(model: nn.Module, seed: int) -> None:
    """
    :param model: of decoder blocks named as Llama's or Gemma 3's, float32, without biases; changed
        in place
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        before_mlp = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        rescale_norm(block.input_layernorm, projections, generator)
        rescale_norm(before_mlp, [mlp.gate_proj, mlp.up_proj], generator)
        rescale_pair(mlp.up_proj, mlp.down_proj, generator, mlp.up_proj.out_features, 1)
        repeats = attention.o_proj.in_features // attention.v_proj.out_features
        rescale_pair(attention.v_proj, attention.o_proj, generator, attention.head_dim, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = torch.arange(1000, 1064)[None]
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        rescale(model, arguments.seed)
        model = model.to(torch.bfloat16)
        after = model.float()(ids).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    for path in arguments.model.glob(TOKENIZER_FILES):
        shutil.copyfile(path, arguments.output / path.name)
    print(f"{arguments.output}: KL divergence from {arguments.model} {float(divergence):.2g}")


if __name__ == "__main__":
    main()
