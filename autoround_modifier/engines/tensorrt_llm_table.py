"""
What TensorRT-LLM reads of compressed-tensors: ``quant_config_utils.py`` of its main branch, and the
hardware of its documentation. Nothing was run. Checkpoints of several config groups must not target
layers by their class.
"""

from __future__ import annotations

from autoround_modifier.engines.hardware import cuda
from autoround_modifier.engines.rows import READ, EngineTable, Row, from_file
from autoround_modifier.engines.scheme import FAMILIES

__all__ = ["TENSORRT_LLM"]

SUPPORT = "docs/source/features/quantization.md"
INTEGERS = ("int", "int-int4", "int-fp8")
OTHERS = tuple(x for x in FAMILIES if x not in (*INTEGERS, "int-int8"))

TENSORRT_LLM = EngineTable(
    engine="TensorRT-LLM",
    packages=("tensorrt-llm",),
    version="main, 2026",
    rows=from_file(
        "tensorrt_llm/models/quant_config_utils.py",
        Row(INTEGERS, (), None, READ, note="reads no integers of compressed-tensors"),
        Row(("int-int8",), (), None, READ,
            note="reads no integers of compressed-tensors; W8A8 by channel would be taken for FP8"),
        Row(("fp8",), (cuda(90, 99),), "FP8_PER_CHANNEL_PER_TOKEN", READ, strategies=("channel",),
            dynamic=True),
        Row(("fp8",), (), None, READ, strategies=("channel",), dynamic=True,
            note="has FP8 by channel and token for compute capability 9.0 only", source=SUPPORT),
        Row(("fp8",), (), None, READ, note="reads FP8 by channel with dynamic activations only"),
        Row(("fp8_block",), (cuda(90, 109),), "FP8_BLOCK_SCALES", READ),
        Row(("fp8_block",), (cuda(0),), None, READ, source=SUPPORT,
            note="has FP8 by block for compute capability 9.0 to 10.3 only"),
        Row(("nvfp4",), (cuda(100),), "NVFP4", READ),
        Row(("nvfp4",), (cuda(0),), None, READ, note="needs compute capability 10.0 or higher",
            source=SUPPORT),
        Row(("mxfp4a16",), (cuda(100),), "W4A16_MXFP4", READ),
        Row(("mxfp4a16",), (cuda(0),), None, READ, note="needs compute capability 10.0 or higher",
            source=SUPPORT),
        Row(OTHERS, (cuda(0),), None, READ, note="has no scheme of these"),
        Row(FAMILIES, (), None, READ, note="runs on NVIDIA GPUs only", source=SUPPORT),
    ),
    command="trtllm-serve {folder}{options}",
    repository="NVIDIA/TensorRT-LLM",
    platforms=("cuda",),
    install="pip install tensorrt-llm",
    fuses=True,
)  # fmt: skip
