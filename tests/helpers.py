"""Reads integers back: from a module in memory and from a saved checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import quantize
from safetensors import safe_open
from torch import Tensor, nn

from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.device import Compute
from autoround_modifier.formats import TunedWeight
from autoround_modifier.host.schemes import QuantizationArgs, weight_spec
from autoround_modifier.search import clipping_range


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }


def integers(module: nn.Module) -> Tensor:
    """The integers the library will pack for this module."""
    args = module.quantization_scheme.weights
    return quantize(
        module.weight, module.weight_scale, module.weight_zero_point, args, dtype=torch.int8
    )


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def saved_integers(tensors: dict[str, Tensor], name: str, num_bits: int) -> Tensor:
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    return unpack_from_int32(tensors[f"{name}.weight_packed"], num_bits, shape)


def saved_zero_points(tensors: dict[str, Tensor], name: str, num_bits: int) -> Tensor:
    scale = tensors[f"{name}.weight_scale"]
    return unpack_from_int32(
        tensors[f"{name}.weight_zero_point"], num_bits, scale.shape, packed_dim=0
    )


def saved_floats(tensors: dict[str, Tensor], name: str, e2m1: list[float]) -> tuple[Tensor, Tensor]:
    """
    The numbers and scales of a floating-point weight, read from the bits of a checkpoint.

    :param e2m1: the non-negative numbers of E2M1, in the order of their encodings
    :return: (out_features, in_features), float32; scales as float32
    """
    scale = tensors[f"{name}.weight_scale"]
    if scale.dtype == torch.uint8:  # E8M0: an exponent with bias 127
        scale = 2.0 ** (scale.double() - 127)
    if f"{name}.weight_packed" not in tensors:
        return tensors[f"{name}.weight"].float(), scale.float()
    packed = tensors[f"{name}.weight_packed"].long()
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    numbers = torch.tensor([*e2m1, *(-number for number in e2m1)])
    return numbers[nibbles], scale.float()


def tuned_weight(
    weight: Tensor,
    args: QuantizationArgs,
    initial_range: tuple[Tensor, Tensor] | None = None,
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
    compiled: bool = False,
) -> TunedWeight:
    """A `TunedWeight` by the arguments of compressed-tensors."""
    compute = Compute(compiled)
    return TunedWeight(weight, weight_spec(args), initial_range, global_scale, importance, compute)


def search_range(
    weight: Tensor,
    args: QuantizationArgs,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """`search_range` by the arguments of compressed-tensors."""
    return clipping_range.search_range(
        weight, weight_spec(args), importance, global_scale, Compute(compiled)
    )


def record_call(
    store: CalibrationStore,
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    token_mask: Tensor | None = None,
) -> None:
    """Record a call of a block that does not write into its arguments."""
    store.enter(block, args, kwargs, token_mask)
    store.leave(block, output)
