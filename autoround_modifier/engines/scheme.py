"""How weights and the inputs of layers are quantized, as ``config.json`` says; without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoround_modifier.gguf_schemes import GGUF

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
    "gguf",  # types of GGUF, for llama.cpp; the checkpoint beside the blocks is not quantized
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
    :param format: of compressed-tensors, such as ``pack-quantized``, or a scheme of GGUF, such as
        ``gguf:q4_k_m``; None if it is not known
    :param numbers: what weights are: ``INT``, ``FP``, ``MXFP`` or ``NVFP``
    :param input_numbers: the same of quantized activations
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
    numbers: str = "INT"
    input_numbers: str = "INT"

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
        own = str(group.get("format")).startswith(GGUF)
        family = "gguf" if own else _family(weights, inputs, strategy)
        numbers = _numbers(weights, family)
        return cls(
            family=family,
            num_bits=int(weights.get("num_bits") or 8),
            symmetric=weights.get("symmetric") is not False,
            group_size=0 if strategy == "block" else int(size or -1),
            strategy=strategy,
            block=(int(block[0]), int(block[1])) if block else None,
            input_bits=int(inputs.get("num_bits") or 8) if inputs else None,
            dynamic=not inputs or bool(inputs.get("dynamic")),
            format=_plain(group.get("format")) or format,
            numbers=numbers,
            input_numbers=_input_numbers(inputs, numbers) if inputs else "INT",
        )

    @property
    def weight_tag(self) -> str:
        """Such as ``INT4``, ``FP8``, ``NVFP4`` or ``GGUF``."""
        if self.family == "gguf":
            return "GGUF"
        return f"{self.numbers}{self.num_bits}"

    @property
    def activation_tag(self) -> str | None:
        """The same of activations; None where they stay in 16 bits."""
        return None if self.input_bits is None else f"{self.input_numbers}{self.input_bits}"

    @property
    def weights(self) -> str:
        """Such as ``INT4, symmetric, groups of 64``."""
        if self.family == "gguf":
            return f"{self.label.removeprefix('GGUF ')} of llama.cpp, with quantized scales"
        signs = ["symmetric" if self.symmetric else "asymmetric"] if self.numbers == "INT" else []
        return ", ".join([self.weight_tag, *signs, self._scales])

    @property
    def activations(self) -> str:
        """Such as ``INT8, dynamic``."""
        if self.input_bits is None:
            return "16 bits"
        when = "dynamic" if self.dynamic else "static"
        if self.input_numbers == "NVFP":
            when += ", with a static global scale"
        return f"{self.activation_tag}, {when}"

    @property
    def label(self) -> str:
        """
        Short name, such as ``W2A16 G64``, ``W4A16 asym G128``, ``W8A8 channel dynamic``,
        ``FP8 block 128x128 dynamic``, ``NVFP4A16`` or ``GGUF Q4_K_M``.
        """
        if self.family == "gguf":
            return f"GGUF {str(self.format).removeprefix(GGUF).upper()}"
        if not self.num_bits:
            return "unknown scheme"
        inputs = 16 if self.input_bits is None else self.input_bits
        if self.numbers == "INT":
            kind = self.input_numbers if self.input_numbers != "INT" else ""
            name = f"W{self.num_bits}A{kind}{inputs}"
        else:
            name = self.weight_tag + ("" if inputs == self.num_bits else f"A{inputs}")
        if self.numbers in ("MXFP", "NVFP"):  # which fix the rest
            return name
        parts = [name] if self.symmetric else [name, "asym"]
        parts.append(self._short_scales)
        if self.input_bits is not None:
            parts.append("dynamic" if self.dynamic else "static")
        return " ".join(parts)

    @property
    def _scales(self) -> str:
        if self.block is not None:
            return f"blocks of {self.block[0]} x {self.block[1]}"
        if self.group_size > 0:
            return f"groups of {self.group_size}"
        return f"one scale for each {'tensor' if self.strategy == 'tensor' else 'output channel'}"

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


def _numbers(weights: Mapping[str, Any], family: str) -> str:
    """:return: see `Scheme`"""
    if _plain(weights.get("type") or "int") == "int":
        return "INT"
    return family[:4].upper() if family.startswith(("mxfp", "nvfp")) else "FP"


def _input_numbers(inputs: Mapping[str, Any], numbers: str) -> str:
    """:param numbers: of the weights"""
    if _plain(inputs.get("type") or "int") == "int":
        return "INT"
    if numbers == "MXFP" or (numbers == "NVFP" and inputs.get("num_bits") == 4):
        return numbers
    return "FP"


def _plain(value: Any) -> Any:
    """:return: the text of an enumeration's member"""
    return getattr(value, "value", value)
