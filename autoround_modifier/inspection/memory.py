"""Memory that a checkpoint takes while it runs: weights, and keys and values of earlier tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from autoround_modifier.checkpoints.contents import CheckpointContents
from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.engines.answers import EngineSupport
from autoround_modifier.engines.hardware import Hardware
from autoround_modifier.exports.gguf_types import BLOCK_TYPES
from autoround_modifier.gguf_schemes import GGUF

__all__ = ["CacheSize", "MemoryUse", "cache_size", "memory_use"]

UNPACKED_BYTES = 2  # of a weight in 16 bits
CACHE_BYTES = 2  # of a number in an unquantized cache
FULL = ("full_attention", "attention", "global_attention", "deepseek_sparse_attention")
WITHOUT_CACHE = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")
WITHOUT = "{} without"
# Fields of configs whose layers have no cache, or not all the same, in ways that are not known here
NOT_KNOWN = (
    "attn_layer_indices",
    "attn_layer_period",
    "cross_attention_layers",
    "full_attention_interval",
    "global_head_dim",
    "hybrid_override_pattern",
    "layers_block_type",
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
)


class _DiffersByLayer(Exception):
    """A field of a config that each layer has for itself."""


@dataclass(frozen=True)
class CacheSize:
    """
    :param numbers: in the keys and values of one sequence; None if that is not known
    :param layers: in words: how many layers keep what
    :param notes: what is not counted, or why nothing is known
    """

    numbers: int | None
    layers: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryUse:
    """
    Sizes are bytes. What an engine needs beside weights and cache is not counted.

    :param packed: weights as they are saved
    :param unpacked: weights with all quantized ones in 16 bits
    :param quantized_weights: number of them
    :param quantized_bytes: of their tensors
    :param context_length: tokens of a sequence
    :param sequences: at the same time
    :param cache: keys and values, as the checkpoint's scheme of the cache says; None if not known
    :param cache_in_16_bits: the same for engines that do not quantize it
    :param cache_layers: in words: how many layers keep what
    :param notes: what is not counted
    """

    packed: int
    unpacked: int
    quantized_weights: int
    quantized_bytes: int
    context_length: int
    sequences: int
    cache: int | None
    cache_in_16_bits: int | None
    cache_layers: str
    notes: tuple[str, ...] = ()

    def weights_of(self, support: EngineSupport, hardware: Hardware) -> int:
        """:return: bytes of weights in an engine's memory"""
        if support.unpacks:
            return self.unpacked
        kind = BLOCK_TYPES.get(support.export_on(hardware).removeprefix(GGUF))
        if kind is None:
            return self.packed
        quantized = int(self.quantized_weights * kind.bits / 8)
        return self.packed - self.quantized_bytes + quantized

    def cache_of(self, support: EngineSupport) -> int | None:
        """:return: bytes of its key-value cache"""
        return self.cache_in_16_bits if support.unpacks else self.cache


def memory_use(
    contents: CheckpointContents,
    config: Mapping[str, Any],
    context_length: int | None = None,
    sequences: int = 1,
) -> MemoryUse:
    """
    :param contents: of the checkpoint
    :param config: content of ``config.json``
    :param context_length: tokens of a sequence; None for 4096, or what the model takes if that is
        less
    :param sequences: at the same time
    """
    model = _model_config(config)
    if context_length is None:
        longest = _field(model, "max_position_embeddings")
        context_length = min(4096, longest if isinstance(longest, int) else 4096)
    quantized_bytes = round((contents.quantized_bits or 0.0) * contents.quantized_weights / 8)
    size = cache_size(model, context_length)
    numbers = None if size.numbers is None else size.numbers * sequences
    bits = contents.kv_cache_bits or 8 * CACHE_BYTES
    unpacked = contents.quantized_weights * UNPACKED_BYTES
    return MemoryUse(
        packed=contents.bytes,
        unpacked=contents.bytes - quantized_bytes + unpacked,
        quantized_weights=contents.quantized_weights,
        quantized_bytes=quantized_bytes,
        context_length=context_length,
        sequences=sequences,
        cache=None if numbers is None else numbers * bits // 8,
        cache_in_16_bits=None if numbers is None else numbers * CACHE_BYTES,
        cache_layers=size.layers,
        notes=size.notes,
    )


def cache_size(config: PreTrainedConfig | Mapping[str, Any], context_length: int) -> CacheSize:
    """
    :param config: of the model
    :param context_length: tokens of one sequence
    """
    try:
        return _cache_size(config, context_length)
    except _DiffersByLayer as error:
        return _not_known(f"its layers are not alike ({error})")


def _cache_size(config: PreTrainedConfig | Mapping[str, Any], context_length: int) -> CacheSize:
    found = {name: _field(config, name) for name in NOT_KNOWN}
    strange = [name for name, value in found.items() if value]
    layers, heads = _field(config, "num_hidden_layers"), _field(config, "num_attention_heads")
    kv_heads = _field(config, "num_key_value_heads")
    if kv_heads is None and _field(config, "multi_query"):  # of Falcon and others
        grouped = _field(config, "new_decoder_architecture")
        kv_heads = _field(config, "num_kv_heads") if grouped else 1
    kv_heads = kv_heads or heads
    if _field(config, "is_encoder_decoder"):
        return _not_known("the model has an encoder and a decoder")
    if not all(isinstance(x, int) for x in (layers, heads, kv_heads)):
        return _not_known("its config does not say how many layers and heads there are")
    kinds = _field(config, "layer_types")
    if strange and not kinds:
        return _not_known(f"its layers are not alike ({', '.join(strange)})")
    if "global_head_dim" in strange or "cross_attention_layers" in strange:
        return _not_known("its layers are not alike")
    shared = int(_field(config, "num_kv_shared_layers") or 0)
    tokens, words, notes = _tokens(config, kinds, layers - shared, context_length)
    if tokens is None:
        return _not_known(words)
    if shared:
        notes.append(f"{shared} layers use the cache of others")
    latent, rotary = _field(config, "kv_lora_rank"), _field(config, "qk_rope_head_dim")
    if latent:
        notes.append("latent attention (MLA): an engine that caches all heads takes more")
        if _field(config, "index_head_dim"):
            notes.append("the cache of its indexer is not counted")
        numbers = latent + int(rotary or 0)
        return CacheSize(
            tokens * numbers, f"{words}, {latent} + {rotary or 0} numbers a token", tuple(notes)
        )
    hidden = _field(config, "hidden_size")
    head_dim = _field(config, "head_dim") or (hidden // heads if hidden else None)
    if not isinstance(head_dim, int):
        return _not_known("its config does not say the size of a head")
    numbers = tokens * 2 * kv_heads * head_dim
    plural = "head" if kv_heads == 1 else "heads"
    return CacheSize(numbers, f"{words}, {kv_heads} {plural} of {head_dim}", tuple(notes))


def _tokens(
    config: PreTrainedConfig | Mapping[str, Any],
    kinds: Sequence[str] | None,
    layers: int,
    context_length: int,
) -> tuple[int | None, str, list[str]]:
    """:return: tokens in the cache, of all layers together; layers in words; notes"""
    window, chunk = _field(config, "sliding_window"), _field(config, "attention_chunk_size")
    if not kinds:
        slides = window and _field(config, "use_sliding_window") is not False
        kinds = ["sliding_attention" if slides else "full_attention"] * layers
    counts: dict[str, int] = {}
    total = 0
    for kind in list(kinds)[:layers]:
        limit = {"sliding_attention": window, "chunked_attention": chunk}.get(kind)
        if kind in FULL or (kind in ("sliding_attention", "chunked_attention") and not limit):
            total, name = total + context_length, "{}"
        elif limit:
            total, name = total + min(context_length, limit), f"{{}} with a window of {limit}"
        elif kind in WITHOUT_CACHE:
            name = WITHOUT
        else:
            return None, f"layers of the kind {kind} are not known here", []
        counts[name] = counts.get(name, 0) + 1
    words = ", ".join(
        name.format(f"{number} layer{'s' if number > 1 else ''}") for name, number in counts.items()
    )
    notes = ["the states of its recurrent layers are not counted"]
    return total, words, notes if WITHOUT in counts else []


def _not_known(reason: str) -> CacheSize:
    return CacheSize(None, "", (f"the key-value cache is not known: {reason}",))


def _field(config: PreTrainedConfig | Mapping[str, Any], name: str) -> Any:
    """
    :return: None if there is none
    :raises _DiffersByLayer: if each layer has its own
    """
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except Exception as error:  # Transformers' own, for fields that differ by layer
        raise _DiffersByLayer(name) from error


def _model_config(config: Mapping[str, Any]) -> PreTrainedConfig | Mapping[str, Any]:
    """:return: with the defaults of its class where Transformers knows it"""
    raw = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**raw).get_text_config(decoder=True)
    except Exception:  # a type that is not known here, or fields that its class does not take
        return dict(text_part(config))
