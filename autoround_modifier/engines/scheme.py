"""How weights and the inputs of layers are quantized, as ``config.json`` says; without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Scheme"]

MXFP4_GROUP = 32
# What a scheme is to engines, whatever its bits and groups
FAMILIES = (
    "int",  # integer weights, 16-bit activations
    "int-int8",  # integer weights, 8-bit integer activations
    "int-int4",
    "int-fp8",
    "fp8",  # FP8 weights by tensor or channel, FP8 activations
    "fp8_block",
    "fp8a16",
    "mxfp4",
    "mxfp4a16",
    "mxfp4a8",
    "mxfp8",
    "mxfp8a16",
    "nvfp4",
    "nvfp4a16",
    "other",
)


@dataclass(frozen=True)
class Scheme:
    """
    :param family: one of `FAMILIES`
    :param num_bits: of a weight
    :param symmetric: false for weights with zero points
    :param group_size: input features that share a scale; -1 where a whole row or tensor does, 0
        where scales are those of blocks
    :param strategy: of compressed-tensors: ``group``, ``channel``, ``tensor``, ``block``,
        ``tensor_group``
    :param block: rows and columns that share a scale, for strategy ``block``
    :param input_bits: of quantized activations; None for 16-bit ones
    :param dynamic: whether scales of activations are found while the model runs
    :param format: of compressed-tensors, such as ``pack-quantized``; None if it is not known
    """

    family: str
    num_bits: int
    symmetric: bool = True
    group_size: int = -1
    strategy: str = "group"
    block: tuple[int, int] | None = None
    input_bits: int | None = None
    dynamic: bool = True
    format: str | None = None

    @classmethod
    def of_group(cls, group: Mapping[str, Any], format: str | None = None) -> Scheme | None:
        """
        :param group: config group, as in ``config.json`` or in a recipe
        :param format: of the checkpoint, for groups that have none of their own
        :return: None if the group does not quantize weights
        """
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not weights:
            return None
        block, size = weights.get("block_structure"), weights.get("group_size")
        strategy = _plain(weights.get("strategy")) or (
            "block" if block else "group" if size and size > 0 else "channel"
        )
        return cls(
            family=_family(weights, inputs, strategy),
            num_bits=int(weights.get("num_bits") or 8),
            symmetric=weights.get("symmetric") is not False,
            group_size=0 if strategy == "block" else int(size or -1),
            strategy=strategy,
            block=(int(block[0]), int(block[1])) if block else None,
            input_bits=int(inputs.get("num_bits") or 8) if inputs else None,
            dynamic=not inputs or bool(inputs.get("dynamic")),
            format=_plain(group.get("format")) or format,
        )

    @property
    def weights(self) -> str:
        """Such as ``integers of 4 bits, groups of 64, symmetric``."""
        kind = f"integers of {self.num_bits} bits" if self.is_integer else self._float_name
        parts = [kind, self._scales]
        if self.is_integer:
            parts.append("symmetric" if self.symmetric else "with zero points")
        return ", ".join(parts)

    @property
    def activations(self) -> str:
        """Such as ``8-bit integers, dynamic``."""
        if self.input_bits is None:
            return "16 bits"
        if self.family in ("mxfp4", "mxfp8", "nvfp4"):
            return f"{self._float_name}, dynamic" + (
                " within a calibrated global scale" if self.family == "nvfp4" else ""
            )
        kind = f"{self.input_bits}-bit integers" if self.family.startswith("int-int") else "FP8"
        return f"{kind}, {'dynamic' if self.dynamic else 'static'}"

    @property
    def label(self) -> str:
        """Short name, such as ``W2 sym G64``, ``FP8 channel dynamic`` or ``NVFP4``."""
        if self.family.startswith(("mxfp", "nvfp")):
            return self.family.upper()
        when = "" if self.input_bits is None else " dynamic" if self.dynamic else " static"
        if not self.is_integer:
            name = {"fp8": "FP8", "fp8_block": "FP8", "fp8a16": "FP8A16"}.get(self.family)
            return f"{name or f'float{self.num_bits}'} {self._short_scales}{when}"
        inputs = {"int": "", "int-int8": "A8", "int-int4": "A4", "int-fp8": "AFP8"}[self.family]
        return f"W{self.num_bits}{inputs} {'sym' if self.symmetric else 'asym'} " + (
            self._short_scales + when
        )

    @property
    def is_integer(self) -> bool:
        return self.family.startswith("int")

    @property
    def _float_name(self) -> str:
        if self.family.startswith(("mxfp", "nvfp")):
            return self.family.upper().partition("A")[0]
        return "FP8" if self.num_bits == 8 else f"floating-point numbers of {self.num_bits} bits"

    @property
    def _scales(self) -> str:
        if self.block is not None:
            return f"blocks of {self.block[0]} x {self.block[1]}"
        if self.group_size > 0:
            return f"groups of {self.group_size}"
        return f"one scale per {'tensor' if self.strategy == 'tensor' else 'output channel'}"

    @property
    def _short_scales(self) -> str:
        if self.block is not None:
            return f"block {self.block[0]}x{self.block[1]}"
        return f"G{self.group_size}" if self.group_size > 0 else self.strategy


def _family(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, strategy: str) -> str:
    """:return: one of `FAMILIES`, decided as compressed-tensors and engines do"""
    bits = int(weights.get("num_bits") or 8)
    if _plain(weights.get("type") or "int") == "int":
        if not inputs:
            return "int"
        if _plain(inputs.get("type") or "int") == "float":
            return "int-fp8" if inputs.get("num_bits") == 8 else "other"
        return {8: "int-int8", 4: "int-int4"}.get(int(inputs.get("num_bits") or 8), "other")
    if strategy == "tensor_group":
        return "nvfp4" if inputs else "nvfp4a16"
    powers = str(weights.get("scale_dtype")).endswith("uint8")
    if bits == 4 and strategy == "group" and (powers or weights.get("group_size") == MXFP4_GROUP):
        if not inputs:
            return "mxfp4a16"
        return "mxfp4" if inputs.get("num_bits") == 4 else "mxfp4a8"
    if bits != 8:
        return "other"
    if powers:
        return "mxfp8" if inputs else "mxfp8a16"
    if not inputs:
        return "fp8a16"
    return "fp8_block" if strategy == "block" else "fp8"


def _plain(value: Any) -> Any:
    """:return: the text of an enumeration's member"""
    return getattr(value, "value", value)
