"""
Transformers decompresses every format of compressed-tensors as it is loaded or first run, on any
hardware; activations are quantized by fake quantization. What it makes of experts is in
`engines.transformers_loader`. What newer releases refuse is from ``tests/latest``.
"""

from __future__ import annotations

from autoround_modifier.engines.hardware import CPU
from autoround_modifier.engines.rows import READ, RELOAD, RUN, EngineTable, Row, from_file
from autoround_modifier.engines.scheme import FAMILIES

__all__ = ["TRANSFORMERS"]

KNOWN = tuple(family for family in FAMILIES if family not in ("other", "mxfp4a8", "gguf"))
PACKED = ("int-int8", "int-int4", "int-fp8")
REFUSED = (
    "5.23 and 5.24 refuse zero points; with one config group, pass "
    "`quantization_config=CompressedTensorsConfig(dequantize=True)`"
)
KERNEL = "PyTorch, on decompressed weights"
LOAD = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r}, device_map="auto")"""

TRANSFORMERS = EngineTable(
    engine="Transformers",
    packages=("transformers",),
    version="5.17",
    rows=from_file(
        "src/transformers/quantizers/quantizer_compressed_tensors.py",
        Row(("int",), (CPU,), KERNEL, RUN, symmetric=False, until="5.23", note=REFUSED),
        Row(("int",), (), KERNEL, READ, symmetric=False, until="5.23", note=REFUSED),
        Row(PACKED, (CPU,), KERNEL, RELOAD, symmetric=True, formats=("pack-quantized",)),
        Row(
            PACKED,
            (),
            KERNEL,
            READ,
            symmetric=False,
            until="5.23",
            note=REFUSED,
            formats=("pack-quantized",),
        ),
        Row(KNOWN, (CPU,), KERNEL, RUN),
        Row(KNOWN, (), KERNEL, READ),
        Row(("mxfp4a8",), (), KERNEL, READ),
    ),
    command=LOAD,
    repository="huggingface/transformers",
    install="pip install transformers compressed-tensors",
    unpacks=True,
)
