"""The layers of a quantized model, as a report lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.gguf_schemes import GGUF_TYPES
from autoround_modifier.host.layers import Layer
from autoround_modifier.host.saved_size import saved_bits_of_shape
from autoround_modifier.host.schemes import QuantizationScheme
from autoround_modifier.progress.block_report import LayerReport
from autoround_modifier.report.schema import LayerRecord

__all__ = ["layer_kind", "layer_records", "unquantized_layers"]


def layer_records(
    model: nn.Module,
    tuned: Mapping[str, LayerReport],
    weight_errors: Mapping[str, float],
    dtype: torch.dtype,
    gguf_types: Mapping[str, str],
) -> list[LayerRecord]:
    """
    :param model: quantized, compressed or not
    :param tuned: by name
    :param weight_errors: by name, of all layers that this package quantized
    :param dtype: of the weights before they were quantized
    :param gguf_types: layer -> name of the type of GGUF that it was tuned in
    :return: of each layer with quantized weights, in the order of the model
    """
    records = []
    for name, layer, scheme in _layers(model):
        shape = _shape(layer)
        weights = shape[0] * shape[1]
        if name in gguf_types:
            kind = GGUF_TYPES[gguf_types[name]]
            label, bits = kind.label, kind.bits_per_weight
        else:
            written = None if scheme is None else Scheme.of_group(scheme.model_dump(mode="json"))
            if scheme is None or written is None:
                continue
            is_embedding = isinstance(layer, nn.Embedding)
            label = written.label
            bits = saved_bits_of_shape(shape, dtype, scheme, is_embedding) / weights
        report = tuned.get(name) or LayerReport(name)
        is_tuned = report.error is not None
        records.append(
            LayerRecord(
                name=name,
                kind=layer_kind(name),
                block=_block_number(name),
                scheme=label,
                bits_per_weight=bits,
                weights=weights,
                error_of="output" if is_tuned else "weight",
                initial_error=report.initial_error,
                error=report.error if is_tuned else weight_errors.get(name),
                moved=report.moved,
                tokens=report.tokens,
            )
        )
    return records


def unquantized_layers(model: nn.Module) -> list[str]:
    """:return: names of linear layers and embeddings whose weights are not quantized"""
    return [name for name, _, scheme in _layers(model) if scheme is None or scheme.weights is None]


def layer_kind(name: str) -> str:
    """:return: the last part of a name; ``experts.gate_proj`` for all routed experts"""
    kind = name.rpartition(".")[2]
    return f"experts.{kind}" if EXPERT.search(name) else kind


def _layers(model: nn.Module) -> list[tuple[str, Layer, QuantizationScheme | None]]:
    return [
        (name, module, getattr(module, "quantization_scheme", None))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    ]


def _shape(layer: Layer) -> tuple[int, int]:
    """Of the weight, which a compressed layer no longer has."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


def _block_number(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])
