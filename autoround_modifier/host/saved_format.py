"""How integers are laid out in the checkpoint, where the host's choice cannot be loaded."""

from __future__ import annotations

import json
from typing import Any

from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from torch import nn

__all__ = ["choose_saved_format", "saved_group"]


def choose_saved_format(
    scheme: QuantizationScheme, module_type: type[nn.Module] = nn.Linear
) -> None:
    """
    compressed-tensors 0.19 does not treat subclasses of Linear (Falcon's) as linear layers and
    would save them uncompressed; they get the format of Linear.

    Integer weights with quantized activations are packed where vLLM's scheme reads only packed
    integers, unless ``scheme.format`` is set. compressed-tensors 0.19 would store one integer per
    byte, which vLLM accepts only for W8A8 (8 bits by channel) and W4A8 with symmetric weights, and
    for static activations.

    :param scheme: of a layer; updated
    :param module_type: its class
    """
    if (
        scheme.format is None
        and module_type is not nn.Linear
        and issubclass(module_type, nn.Linear)
    ):
        scheme.format = infer_module_format(nn.Linear, scheme)
    weights, inputs = scheme.weights, scheme.input_activations
    if scheme.format is not None or weights is None or inputs is None:
        return
    if weights.type != QuantizationType.INT:
        return
    byte_each = not inputs.dynamic or (
        weights.symmetric
        and inputs.num_bits == 8
        and inputs.strategy == QuantizationStrategy.TOKEN
        and (
            weights.num_bits == 4
            or (weights.num_bits == 8 and weights.strategy == QuantizationStrategy.CHANNEL)
        )
    )
    if inputs.type == QuantizationType.FLOAT or not byte_each:
        scheme.format = CompressionFormat.pack_quantized


def saved_group(scheme: QuantizationScheme) -> dict[str, Any]:
    """
    :param scheme: of linear layers, with weights
    :return: the config group that is written for them, in JSON values
    """
    scheme = scheme.model_copy(deep=True)
    choose_saved_format(scheme)
    if scheme.format is None:
        scheme.format = infer_module_format(nn.Linear, scheme)
    return json.loads(scheme.model_dump_json())
