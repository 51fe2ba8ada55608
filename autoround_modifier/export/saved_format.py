"""How integers are laid out in the checkpoint, where the host's choice cannot be loaded."""

from __future__ import annotations

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)

__all__ = ["choose_saved_format"]


def choose_saved_format(scheme: QuantizationScheme) -> None:
    """
    Pack integer weights that have quantized activations where vLLM's scheme for them reads packed
    integers only, unless ``scheme.format`` says otherwise. compressed-tensors 0.19 would save each
    in a byte of its own, which vLLM reads of W8A8 and W4A8 with symmetric weights, 8 bits by
    channel, and of static activations.

    :param scheme: of a layer; updated
    """
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
