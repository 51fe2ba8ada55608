"""
Linear layers and embeddings whose weight stays packed and is dequantized where it is used.

They take the place of PyTorch's: a module keeps its class's `forward` and everything else, as long
as that calls the `forward` of `nn.Linear` or `nn.Embedding`, or reads ``weight``.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoround_modifier.inference.packed_weight import PackedSpec, PackedWeight, dequantize_rows

__all__ = ["PackedEmbedding", "PackedLinear", "leave_without_weight"]

# Weights that are dequantized at once
WEIGHTS_AT_ONCE = 2**24


class _Packed(nn.Module):
    """Holds a `PackedWeight` in buffers, with scales in the dtype that is computed in."""

    packed_spec: PackedSpec
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def take(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        """
        :param weight: on the device where the layer computes
        :param dtype: to compute in
        """
        self.register_buffer("weight_packed", weight.packed, persistent=False)
        self.register_buffer("weight_scale", weight.scale.to(dtype), persistent=False)
        self.register_buffer("weight_zero_point", weight.zero_point, persistent=False)

    def rows(self, start: int | Tensor, stop: int | None = None) -> Tensor:
        """
        :param start: first row, or indices of rows, (rows,)
        :param stop: the row after the last
        :return: (rows, in_features), dequantized
        """
        index = start if isinstance(start, Tensor) else slice(start, stop)
        zero_point = self.weight_zero_point
        return dequantize_rows(
            self.weight_packed[index],
            self.weight_scale[index],
            None if zero_point is None else zero_point[index],
            self.packed_spec.num_bits,
            self.packed_spec.in_features,
        )

    @property
    def weight(self) -> Tensor:
        """The whole weight, dequantized: (out_features, in_features)."""
        return self.rows(0, None)


class PackedLinear(_Packed, nn.Linear):  # type: ignore[override]
    """A linear layer; weights of `WEIGHTS_AT_ONCE` are dequantized at a time."""

    def forward(self, input: Tensor) -> Tensor:
        spec = self.packed_spec
        at_once = max(1, WEIGHTS_AT_ONCE // spec.in_features)
        if at_once >= spec.out_features:
            return functional.linear(input, self.rows(0, None), self.bias)
        parts = [
            functional.linear(input, self.rows(start, start + at_once))
            for start in range(0, spec.out_features, at_once)
        ]
        result = torch.cat(parts, dim=-1)
        return result if self.bias is None else result + self.bias


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[override]
    """An embedding, of which only the rows that are looked up are dequantized."""

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input.reshape(-1)).view(*input.shape, -1)


def leave_without_weight(module: nn.Module, spec: PackedSpec) -> None:
    """
    Let a module take a packed weight, and drop its own.

    :param module: a linear layer or an embedding; its class becomes one that is derived from it
    :param spec: of the weight that it will be given
    """
    base = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
    del module.weight
    module.__class__ = _derived(cast(Any, type(module)), cast(Any, base))
    cast(_Packed, module).packed_spec = spec
    module._is_hf_initialized = True  # type: ignore[assignment]  # there is nothing to initialize


@functools.cache
def _derived(kind: type[nn.Module], base: type[_Packed]) -> type[nn.Module]:
    """:return: a class whose `super().forward` is that of ``base``"""
    if kind in (nn.Linear, nn.Embedding):
        return base
    return type(f"Packed{kind.__name__}", (kind, base), {"__module__": kind.__module__})
