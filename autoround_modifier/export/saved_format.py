"""How integers are laid out in the checkpoint, where the host's choice cannot be loaded."""

from __future__ import annotations

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, QuantizationType

__all__ = ["choose_saved_format"]


def choose_saved_format(scheme: QuantizationScheme) -> None:
    """
    Pack integer weights that have floating-point activations (W4AFP8), unless ``scheme.format``
    says otherwise. compressed-tensors 0.19 would save each in a byte of its own; vLLM's scheme for
    them reads packed integers only.

    :param scheme: of a layer; updated
    """
    weights, inputs = scheme.weights, scheme.input_activations
    if scheme.format is not None or weights is None or inputs is None:
        return
    if weights.type == QuantizationType.INT and inputs.type == QuantizationType.FLOAT:
        scheme.format = CompressionFormat.pack_quantized
