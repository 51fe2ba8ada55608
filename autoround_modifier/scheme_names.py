"""
The names of schemes, and what they stand for, without compressed-tensors, which takes seconds to
import. A test compares each with the preset of that name in compressed-tensors.
"""

from __future__ import annotations

import copy
import difflib
import re
from typing import Any

from autoround_modifier.errors import SchemeError
from autoround_modifier.gguf_schemes import GGUF, GGUF_SCHEMES, GGUF_TYPES, gguf_scheme

__all__ = [
    "ALIASES",
    "SCHEMES",
    "SCHEME_NAME",
    "did_you_mean",
    "group_named",
    "saved_bits_per_weight",
    "saved_format",
]

# W2A16G64, W4A16_ASYM, W4A16_ASYM_G32: a preset of compressed-tensors, its group size, zero points
SCHEME_NAME = re.compile(
    r"(?P<preset>.+?)(?P<asymmetric>_ASYM)?(_?G(?P<group_size>\d+))?", re.IGNORECASE
)
SCALE_BITS = 16
PACKED = "pack-quantized"
GROUP = 128
BY_TOKEN = {"symmetric": True, "strategy": "token", "dynamic": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
MX |= {"scale_dtype": "torch.uint8"}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
NVFP4 |= {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}


def _integer(num_bits: int, input_bits: int = 16, symmetric: bool = True) -> dict[str, Any]:
    """:return: config group of integer weights in groups of 128, with dynamic activations"""
    weights = {"num_bits": num_bits, "type": "int", "symmetric": symmetric}
    group: dict[str, Any] = {"weights": weights | {"strategy": "group", "group_size": GROUP}}
    if input_bits < 16:
        group["input_activations"] = {"num_bits": input_bits, "type": "int"} | BY_TOKEN
    return group


def _with_inputs(weights: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """:return: config group whose activations are quantized like the weights, but for ``inputs``"""
    return {"weights": weights, "input_activations": weights | inputs}


W8A8 = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int"} | BY_TOKEN,
}
# Name -> config group, without targets
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"W{bits}A16": _integer(bits) for bits in range(2, 9)},
    "W4A16_ASYM": _integer(4, symmetric=False),
    **{f"W{bits}A8": _integer(bits, 8) for bits in range(2, 8)},
    **{f"W{bits}A4": _integer(bits, 4) for bits in range(2, 5)},
    "W8A8": W8A8,
    "INT8": W8A8,
    "W4AFP8": _integer(4) | {"input_activations": FLOAT8 | BY_TOKEN},
    "FP8": _with_inputs(FLOAT8 | {"strategy": "tensor"}, dynamic=False),
    "FP8_DYNAMIC": _with_inputs(FLOAT8 | {"strategy": "channel"}, strategy="token", dynamic=True),
    "FP8_BLOCK": {
        "weights": FLOAT8 | {"strategy": "block", "block_structure": [128, 128]},
        "input_activations": FLOAT8 | {"strategy": "group", "group_size": 128, "dynamic": True},
    },
    "MXFP4A16": {"weights": MX | {"num_bits": 4}},
    "MXFP4": _with_inputs(MX | {"num_bits": 4}, dynamic=True),
    "MXFP8A16": {"weights": MX | {"num_bits": 8}},
    "MXFP8": _with_inputs(MX | {"num_bits": 8}, dynamic=True),
    "NVFP4A16": {"weights": NVFP4},
    "NVFP4": _with_inputs(NVFP4, dynamic="local"),
}
# Names of one scheme
ALIASES = {"INT8": "W8A8"}


def group_named(name: str) -> dict[str, Any]:
    """
    :param name: ``<preset>[_ASYM][G<group size>]``, or one of GGUF such as ``gguf:q4_k_m``, in any
        case
    :return: the config group that it stands for, without targets. Of a scheme of GGUF, which
        compressed-tensors does not hold, its name is the ``format``, and the weights are those of
        the type that most layers have
    :raises SchemeError: if there is no such scheme
    """
    of_gguf = gguf_scheme(name)
    if of_gguf is not None:
        return {"weights": GGUF_TYPES[GGUF_SCHEMES[of_gguf]].carrier(), "format": of_gguf}
    if name.upper() in SCHEMES:
        return copy.deepcopy(SCHEMES[name.upper()])
    match = SCHEME_NAME.fullmatch(name)
    preset = match["preset"].upper() if match else ""
    if match is None or preset not in SCHEMES:
        raise SchemeError(
            f"unknown scheme `{name}`{did_you_mean(name)}; use one of {', '.join(SCHEMES)}, "
            "integer weights also with zero points and another group size, as in W2A16G64 or "
            f"W4A16_ASYM_G32; or one of GGUF: {', '.join(GGUF_SCHEMES)}"
        )
    group = copy.deepcopy(SCHEMES[preset])
    weights = group["weights"]
    if weights["type"] != "int":
        raise SchemeError(f"`{name}`: {preset} has no group size or zero points to choose")
    if match["asymmetric"]:
        weights["symmetric"] = False
    if match["group_size"]:
        weights |= {"strategy": "group", "group_size": int(match["group_size"])}
    return group


def did_you_mean(name: str) -> str:
    """
    :param name: of no scheme
    :return: the end of a sentence that names the closest scheme; empty if none is close
    """
    match = re.fullmatch(r"(.+?)((?:_ASYM)?(?:_?G\d+)?)", name.upper())
    preset, rest = (match[1], match[2]) if match else (name.upper(), "")
    close = difflib.get_close_matches(preset, SCHEMES, 1)
    if not close:
        return ""
    suffix = rest if SCHEMES[close[0]]["weights"]["type"] == "int" else ""
    return f" (did you mean {close[0]}{suffix}?)"


def saved_bits_per_weight(group: dict[str, Any], rows: int = 4096, columns: int = 4096) -> float:
    """
    The size that compressed-tensors gives a linear layer in bfloat16, as `host.saved_size` measures
    it by compressing one.

    :param group: config group, with ``weights``
    :param rows: output features
    :param columns: input features, divisible by the group size and by 32
    :return: bits for each weight: packed values, scales, zero points, and scales of activations;
        for GGUF those of the type that most layers have, in a GGUF file
    """
    if str(group.get("format")).startswith(GGUF):
        return GGUF_TYPES[GGUF_SCHEMES[group["format"]]].bits_per_weight
    weights, inputs = group["weights"], group.get("input_activations")
    bits, strategy = weights["num_bits"], weights.get("strategy", "channel")
    if strategy == "block":
        height, width = weights["block_structure"]
        scales = -(-rows // height) * -(-columns // width)
    else:
        size = weights.get("group_size") or columns
        scales = 1 if strategy == "tensor" else rows * (columns // size)
    scale_bits = 8 if weights.get("scale_dtype") else SCALE_BITS
    total = rows * columns * bits + scales * scale_bits
    if weights["type"] == "int":
        packed = saved_format(group) == PACKED
        total = total if packed else rows * columns * 8 + scales * scale_bits
        total += 2 * 64 if packed else 0  # `weight_shape`
        if not weights.get("symmetric", True):
            words = scales // rows * -(-rows * bits // 32)
            total += words * 32 if packed else scales * 8
    if strategy == "tensor_group":
        total += 32  # the global scale
    if inputs and inputs.get("dynamic") is not True:
        total += 32 if inputs.get("dynamic") == "local" else SCALE_BITS
    return total / (rows * columns)


def saved_format(group: dict[str, Any]) -> str | None:
    """
    :param group: config group, with ``weights``
    :return: the format in which integers are saved, as `host.saved_format` chooses it; None for
        floating-point weights
    """
    weights, inputs, format = group["weights"], group.get("input_activations"), group.get("format")
    if format is not None or weights["type"] != "int" or not inputs:
        return format or (PACKED if weights["type"] == "int" else None)
    one_to_a_byte = not inputs.get("dynamic") or (
        weights.get("symmetric", True)
        and inputs["type"] == "int"
        and inputs["num_bits"] == 8
        and inputs.get("strategy") == "token"
        and (
            weights["num_bits"] == 4
            or (weights["num_bits"] == 8 and weights.get("strategy") == "channel")
        )
    )
    return "int-quantized" if one_to_a_byte else PACKED
