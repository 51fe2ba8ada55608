"""
What OpenVINO 2026.4 converts of compressed-tensors: ``frontend/pytorch/compressed_tensors.py``.
Nothing was run.
"""

from __future__ import annotations

from autoround_modifier.engines.hardware import CPU, XPU
from autoround_modifier.engines.rows import READ, EngineTable, Row, from_file
from autoround_modifier.engines.scheme import FAMILIES

__all__ = ["OPENVINO"]

CONVERT = """\
import openvino, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r})
tokens = {{"input_ids": torch.ones(1, 8, dtype=torch.long)}}
openvino.save_model(openvino.convert_model(model, example_input=tokens), "model.xml")"""

OPENVINO = EngineTable(
    engine="OpenVINO",
    packages=("openvino",),
    version="2026.4",
    rows=from_file(
        "src/bindings/python/src/openvino/frontend/pytorch/compressed_tensors.py",
        Row(("int",), (CPU,), "ct_gemm, CPU", READ, (4,), formats=("pack-quantized",),
            strategies=("group",), experts=False,
            note="by openvino.convert_model; optimum-cli does not take compressed-tensors"),
        Row(("int",), (XPU,), "ct_gemm, Intel GPU", READ, (4,), formats=("pack-quantized",),
            strategies=("group",), experts=False,
            note="by openvino.convert_model; optimum-cli does not take compressed-tensors"),
        Row(FAMILIES, (), None, READ,
            note="reads packed 4-bit integers by group only, on CPUs and Intel GPUs"),
    ),
    command=CONVERT,
    repository="openvinotoolkit/openvino",
    platforms=("cpu", "xpu"),
    install="pip install openvino transformers compressed-tensors",
)  # fmt: skip
