"""
What it is worth to search the scales of K-quants with their own quantization: relative squared
errors of weights, without calibration data.

    python benchmarks/gguf_scales.py [MODEL] [--layers REGEX]

Without a model, of random weights with heavy tails. Weights that were in a GGUF file once lie on
the grid of its type, so that they say nothing about that type.

Columns: rounding to nearest on the observed ranges; integers of compressed-tensors with the same
bits and groups, searched as usual, whose scales are quantized afterwards, with the integers kept
and with the weights rounded again; and the search that sees the quantization of the scales.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from autoround_modifier.formats import TunedWeight, WeightSpec
from autoround_modifier.formats.integer import integer_range
from autoround_modifier.formats.super_block import SUPER_BLOCK, SUPER_BLOCK_SPECS, SuperBlockSpec
from autoround_modifier.search import search_range


def weights(folder: Path, pattern: str) -> Iterator[Tensor]:
    """Yield, in float32, the weights of the layers whose names match."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(".weight") and re.search(pattern, name):
                    yield file.get_tensor(name).float()


def heavy_tailed() -> Tensor:
    """:return: (256, 2048), of Student's t-distribution with 5 degrees of freedom"""
    torch.manual_seed(0)
    return 0.02 * torch.distributions.StudentT(5.0).sample((256, 2048))


def errors(weight: Tensor, spec: SuperBlockSpec) -> list[float]:
    """:return: squared errors in the order of the columns"""
    grid, grouping = spec.grid(torch.float32), spec.grouping(tuple(weight.shape))

    def squared(found: Tensor) -> float:
        return float((found - weight).square().sum())

    def searched(initial: tuple[Tensor, Tensor] | None) -> float:
        return squared(TunedWeight(weight, spec, initial).quantized().dequantize())

    integers = WeightSpec("int", spec.num_bits, spec.symmetric, "group", spec.group_size)
    plain = TunedWeight(weight, integers, search_range(weight, integers)).quantized()
    scale = plain.scale.float().view(-1)
    lowest, highest = integer_range(spec.num_bits)
    codes = grouping.split(plain.values).float()
    if spec.symmetric:
        reach = scale * lowest
        ends = reach.clamp(max=0), reach.clamp(min=0)
    else:
        low = scale * (plain.zero_point.float().view(-1) - lowest)
        ends = -low, scale * (highest - lowest) - low
        codes = codes - lowest
    found = grid.sub_scales(*ends)
    kept = grouping.join(found.scale() * codes - found.low())
    return [searched(None), squared(kept), searched(ends), searched(search_range(weight, spec))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder with safetensors files")
    parser.add_argument("--layers", default=r"_proj\.weight$", help="expression for names")
    arguments = parser.parse_args()
    every = [heavy_tailed()]
    if arguments.model is not None:
        every = list(weights(arguments.model, arguments.layers))
    found = [weight for weight in every if weight.shape[1] % SUPER_BLOCK == 0]
    total = sum(float(weight.square().sum()) for weight in found)
    print(f"{len(found)} layers, {sum(weight.numel() for weight in found):,} weights")
    print("| type | observed ranges | integers kept | rounded again | searched in the format |")
    print("| --- | --- | --- | --- | --- |")
    for name, spec in SUPER_BLOCK_SPECS.items():
        sums = [0.0] * 4
        for weight in found:
            sums = [x + y for x, y in zip(sums, errors(weight, spec), strict=True)]
        print(f"| {name.upper()} | " + " | ".join(f"{x / total:.5f}" for x in sums) + " |")


if __name__ == "__main__":
    main()
