"""
Writes a quantized weight into its module so that saving recovers its integers exactly.

compressed-tensors does not save the integers it is given: it quantizes the module's floating-point
weight again, in the weight's own dtype. With bfloat16 weights this is exact up to 6 bits; at 7 and
8 bits the division ``w / s`` can round to a neighbour. So each weight is checked against the
library's own `quantize`, and where the integer does not survive:

1. the weight is moved to a neighbouring bfloat16 value that quantizes to the right integer;
2. where there is none (integers more than 64 steps from the zero point: about 1 % of the weights at
   8 bits, 1 in 10,000 at 7 bits asymmetric), the integer itself becomes the one that will be saved,
   one step away.

Floating-point weights always survive: their codes are far coarser than bfloat16.

Thus the integers in the checkpoint are those of the model in memory, always.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from torch import Tensor, nn

from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.layers import write_parameter

__all__ = ["write_back"]

NEIGHBOURS = (1, -1, 2, -2)
INTEGER_VIEW = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def write_back(module: nn.Module, quantized: QuantizedWeight, args: QuantizationArgs) -> int:
    """
    Set ``weight``, ``weight_scale``, ``weight_zero_point`` and, if the format has one,
    ``weight_global_scale`` of a module.

    :param module: linear layer or embedding with a quantization scheme
    :param quantized: what to write; updated where an integer cannot be saved
    :return: number of integers that had to move by one step
    """
    weight = quantized.dequantize()
    scale, zero_point = quantized.scale, quantized.zero_point

    global_scale = quantized.global_scale

    def saved(value: Tensor) -> Tensor:
        codes = quantize(value, scale, zero_point, args, global_scale=global_scale)
        return codes.to(quantized.values.dtype)

    def differs(value: Tensor) -> Tensor:
        return saved(value).to(value.dtype) != quantized.values.to(value.dtype)

    wrong = differs(weight)
    if wrong.any():
        bits = weight.view(INTEGER_VIEW[weight.element_size()])
        for offset in NEIGHBOURS:
            neighbour = (bits + offset).view(weight.dtype)
            exact = wrong & ~differs(neighbour)
            weight = torch.where(exact, neighbour, weight)
            wrong &= ~exact
        if wrong.any():
            quantized.parts["values"] = saved(weight)

    write_parameter(module, "weight", weight)
    write_parameter(module, "weight_scale", scale)
    write_parameter(module, "weight_zero_point", zero_point)
    if global_scale is not None:
        write_parameter(module, "weight_global_scale", global_scale)
    return int(wrong.sum())
