"""
Reads exported checkpoints bit by bit, from the definitions of their formats. Shares no code with
the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

AWQ_NIBBLES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # channel -> its nibble


class Integers(NamedTuple):
    """Unsigned codes (out, in), scales (out, groups) and unsigned zero points (out, groups)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """:return: (out, in), float64"""
        repeats = self.codes.shape[1] // self.scale.shape[1]
        scale, zero = (x.double().repeat_interleave(repeats, 1) for x in self[1:])
        return scale * (self.codes.double() - zero)


def stream(words: Tensor, num_bits: int) -> Tensor:
    """:return: of rows of 32-bit words, the numbers in each row's stream of bits, lowest first"""
    array = words.numpy().view(np.uint32)
    bits = (array[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    numbers = bits.reshape(len(array), -1, num_bits)
    return torch.from_numpy((numbers << np.arange(num_bits)).sum(-1).astype(np.int64))


def nibbles(words: Tensor) -> Tensor:
    """:return: (rows, columns), of words with eight output channels in AWQ's order"""
    array = words.numpy().view(np.uint32)
    channels = [(array >> (4 * AWQ_NIBBLES[channel])) & 15 for channel in range(8)]
    return torch.from_numpy(np.stack(channels, -1).reshape(len(array), -1).astype(np.int64))


def gptq(tensors: Mapping[str, Tensor], name: str, bits: int, stored_less: int) -> Integers:
    zeros = stream(tensors[f"{name}.qzeros"], bits).T + stored_less
    scale = tensors[f"{name}.scales"]
    assert scale.dtype == torch.float16
    return Integers(stream(tensors[f"{name}.qweight"].T.contiguous(), bits), scale.T, zeros)


def awq(tensors: Mapping[str, Tensor], name: str) -> Integers:
    scale = tensors[f"{name}.scales"]
    assert scale.dtype == torch.float16
    codes, zeros = (nibbles(tensors[f"{name}.{part}"]).T for part in ("qweight", "qzeros"))
    return Integers(codes, scale.T, zeros)


def mlx(tensors: Mapping[str, Tensor], name: str, bits: int) -> Integers:
    """``scales * codes + biases``; the zero point is what the bias is in steps."""
    words = tensors[f"{name}.weight"]
    assert words.dtype == torch.uint32
    scale, bias = tensors[f"{name}.scales"], tensors[f"{name}.biases"]
    assert scale.dtype == bias.dtype
    return Integers(stream(words.view(torch.int32), bits), scale, -bias.double() / scale.double())


def read(folder: Path, tensors: Mapping[str, Tensor], name: str, bits: int) -> Integers:
    """The layer of a checkpoint, in the format that its config names."""
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    if "quantization" in config:
        return mlx(tensors, name, bits)
    method = section["quant_method"]
    if method == "awq":
        return awq(tensors, name)
    if method == "gptq":
        return gptq(tensors, name, bits, {"gptq": 1, "gptq_v2": 0}[section["checkpoint_format"]])
    packing = section["packing_format"]
    if packing == "auto_round:auto_awq":
        return awq(tensors, name)
    return gptq(tensors, name, bits, {"auto_round:auto_gptq": 1, "auto_round": 0}[packing])
