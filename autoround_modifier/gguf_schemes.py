"""
The schemes of GGUF that weights are tuned in: types of llama.cpp, and mixtures of them. Without
PyTorch.

Types and mixtures are those of ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in
llama.cpp's ``src/llama-quant.cpp``, for models other than Falcon. A row that is no multiple of a
type's block gets the type that llama.cpp falls back to; but Q5_0 where that is Q5_1, whose minima
are not tuned here. Experts of a block are one tensor in GGUF and have one type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "GGUF",
    "GGUF_SCHEMES",
    "GGUF_TYPES",
    "K_QUANTS",
    "GGUFType",
    "ModelFacts",
    "fitting_type",
    "gguf_scheme",
    "layer_types",
    "type_of_carrier",
]

GGUF = "gguf:"


@dataclass(frozen=True)
class GGUFType:
    """
    :ivar name: in llama.cpp, in lower case
    :ivar num_bits: of a value
    :ivar symmetric: whether it has no minimum
    :ivar group_size: input features that share a scale
    :ivar block: input features of a block
    :ivar block_bytes: of a block, scales included
    :ivar fallback: type of rows that are not whole blocks; None where llama.cpp has none
    """

    name: str
    num_bits: int
    symmetric: bool
    group_size: int
    block: int
    block_bytes: int
    fallback: str | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def label(self) -> str:
        """Such as ``GGUF Q4_K``."""
        return f"GGUF {self.name.upper()}"

    def carrier(self) -> dict[str, Any]:
        """
        :return: ``weights`` of a scheme of compressed-tensors that layers have while they are tuned
            in this type: LLM-Compressor knows no other. No two types have the same
        """
        return {
            "num_bits": self.num_bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": self.group_size,
        }


GGUF_TYPES: dict[str, GGUFType] = {
    found.name: found
    for found in (
        GGUFType("q2_k", 2, False, 16, 256, 84, "q4_0"),
        GGUFType("q3_k", 3, True, 16, 256, 110, "q4_0"),
        GGUFType("q4_k", 4, False, 32, 256, 144, "q5_0"),
        GGUFType("q5_k", 5, False, 32, 256, 176, "q5_0"),
        GGUFType("q6_k", 6, True, 16, 256, 210, "q8_0"),
        GGUFType("q4_0", 4, True, 32, 32, 18),
        GGUFType("q5_0", 5, True, 32, 32, 22),
        GGUFType("q8_0", 8, True, 32, 32, 34),
    )
}
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
# Scheme -> type of the layers that its mixture says nothing of
GGUF_SCHEMES: dict[str, str] = {f"{GGUF}{name}": name for name in K_QUANTS} | {
    f"{GGUF}q2_k_s": "q2_k",
    f"{GGUF}q3_k_m": "q3_k",
    f"{GGUF}q4_k_m": "q4_k",
}


@dataclass(frozen=True)
class ModelFacts:
    """
    What mixtures depend on.

    :ivar queries_per_key: attention heads for each head of keys and values
    :ivar is_70b: whether llama.cpp calls the model one of 70 billion parameters: a Llama or Qwen2
        of 80 layers with fewer heads of keys than of queries
    :ivar experts: of each mixture, without shared ones; 0 where there are none
    """

    queries_per_key: float = 1.0
    is_70b: bool = False
    experts: int = 0


def gguf_scheme(name: object) -> str | None:
    """:return: the name of a GGUF scheme as it is written here; None if it is none"""
    if not isinstance(name, str):
        return None
    written = name.lower().replace("-", "_")
    return written if written in GGUF_SCHEMES else None


def fitting_type(name: str, in_features: int) -> str | None:
    """
    :param name: of a type
    :param in_features: of a layer
    :return: the type if its blocks divide the row, else what llama.cpp falls back to; None where
        that does not fit either
    """
    kind: GGUFType | None = GGUF_TYPES[name]
    while kind is not None and in_features % kind.block:
        kind = None if kind.fallback is None else GGUF_TYPES[kind.fallback]
    return None if kind is None else kind.name


def type_of_carrier(weights: Any) -> str:
    """
    :param weights: arguments of compressed-tensors, made of `GGUFType.carrier`
    :return: name of the type
    """
    key = (weights.num_bits, bool(weights.symmetric), weights.group_size)
    return next(
        x.name for x in GGUF_TYPES.values() if (x.num_bits, x.symmetric, x.group_size) == key
    )


# ------------------------------------------------------------------------------- mixtures

# What llama.cpp tells apart by the names of tensors: attn_k, attn_v and attn_qkv, attn_output, and
# ffn_down, ffn_down_exps and ffn_down_shexp
ROLES = {
    "k": re.compile(r"k_proj"),
    "v": re.compile(r"v_proj|qkv_proj|query_key_value|Wqkv|kv_b_proj"),
    "o": re.compile(r"o_proj|out_proj|wo|dense"),
    "down": re.compile(r"down_proj|fc2|w2|dense_4h_to_h|c_proj"),
}
ATTENTION = re.compile(r"attn|attention")
NUMBER = re.compile(r"\.(\d+)\.")


def layer_types(scheme: str, names: Sequence[str], facts: ModelFacts) -> dict[str, str]:
    """
    :param scheme: key of `GGUF_SCHEMES`
    :param names: of all linear layers in the decoder blocks, also of those left alone, in order
    :param facts: of the model
    :return: layer -> type, whatever its shape
    """
    general, rule = GGUF_SCHEMES[scheme], _MIXTURES.get(scheme)
    if rule is None:
        return dict.fromkeys(names, general)
    fixed = _WITH_8_EXPERTS[scheme] if facts.experts == 8 else {}
    members: dict[tuple[str, str], list[tuple[str, int]]] = {}
    blocks: dict[str, int] = {}
    for name in names:
        parent, number = _place(name)
        members.setdefault((_role(name), parent), []).append((name, number))
        blocks[parent] = max(blocks.get(parent, 0), number + 1)
    types: dict[str, str] = {}
    for (role, parent), alike in members.items():
        # Of mixtures, llama.cpp goes by the number of the block
        by_block = role == "down" and facts.experts > 1
        for index, (name, number) in enumerate(alike):
            place = (number, blocks[parent]) if by_block else (index, len(alike))
            types[name] = fixed.get(role) or rule(role, *place, facts) or general
    return types


def _place(name: str) -> tuple[str, int]:
    """:return: the list of blocks that a layer is in, and the number of its block"""
    found = NUMBER.search(name)
    return (name, 0) if found is None else (name[: found.start()], int(found[1]))


def _role(name: str) -> str:
    leaf = name.rpartition(".")[2]
    for role, pattern in ROLES.items():
        if pattern.fullmatch(leaf) and (leaf != "dense" or ATTENTION.search(name)):
            return "o" if leaf == "c_proj" and ATTENTION.search(name) else role
    return ""


def _use_more_bits(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _q2_k_s(role: str, index: int, count: int, facts: ModelFacts) -> str | None:
    if role == "v":
        return _raised("q4_k", facts) if facts.queries_per_key >= 4 else None
    return "q4_k" if role == "down" and index < count // 8 else None


def _q3_k_m(role: str, index: int, count: int, facts: ModelFacts) -> str | None:
    if role == "v":
        return _raised("q5_k" if index < 2 else "q4_k", facts)
    if role == "down":
        return "q5_k" if index < count // 16 else "q4_k"
    return "q4_k" if role == "o" else None


def _q4_k_m(role: str, index: int, count: int, facts: ModelFacts) -> str | None:
    more = _use_more_bits(index, count)
    if role == "v":
        return "q6_k" if more else _raised("q4_k", facts)
    return "q6_k" if role == "down" and more else None


def _raised(name: str, facts: ModelFacts) -> str:
    """:return: type of ``attn_v``, of which models of 70 billion parameters have little"""
    return "q5_k" if facts.is_70b and name in ("q3_k", "q4_k") else name


_MIXTURES: dict[str, Callable[[str, int, int, ModelFacts], str | None]] = {
    f"{GGUF}q2_k_s": _q2_k_s,
    f"{GGUF}q3_k_m": _q3_k_m,
    f"{GGUF}q4_k_m": _q4_k_m,
}
# Of models with eight experts, in which attention has few of the weights
_WITH_8_EXPERTS: dict[str, dict[str, str]] = {
    f"{GGUF}q2_k_s": {"k": "q8_0", "v": "q8_0"},
    f"{GGUF}q3_k_m": {"k": "q8_0", "v": "q8_0", "o": "q5_k"},
    f"{GGUF}q4_k_m": {"k": "q8_0", "v": "q8_0", "o": "q5_k"},
}
