"""
The quantized products of MLX 0.32, for checkpoints exported to its own format. On a CPU, MLX's own
dequantization was run on exported words; the kernels of Apple GPUs and of CUDA were read.
"""

from __future__ import annotations

from typing import Any

from autoround_modifier.engines.hardware import CPU, METAL, ROCM, XPU, cuda
from autoround_modifier.engines.rows import READ, RUN, EngineTable, Row
from autoround_modifier.engines.scheme import FAMILIES

__all__ = ["MLX"]

FIT: dict[str, Any] = {"bits": (2, 3, 4, 5, 6, 8), "groups": (32, 64, 128), "export": "mlx"}

MLX = EngineTable(
    engine="MLX",
    packages=("mlx-lm",),
    version="0.32",
    rows=(
        Row(("int",), (), None, READ, experts=True, note="experts are not exported to MLX yet",
            source="mlx/ops.cpp"),
        Row(("int",), (METAL,), "quantized_matmul, Metal", READ,
            source="mlx/backend/metal/quantized.cpp", **FIT),
        Row(("int",), (CPU,), "quantized_matmul, CPU", RUN,
            source="mlx/backend/cpu/quantized.cpp", **FIT),
        Row(("int",), (cuda(80),), "quantized_matmul, CUDA", READ,
            source="mlx/backend/cuda/quantized/quantized.cpp", **FIT),
        Row(("int",), (cuda(0, 79),), None, READ, note="needs compute capability 8.0 or higher",
            source="mlx/backend/cuda/quantized/quantized.cpp"),
        Row(("int",), (ROCM, XPU), None, READ, note="has no kernels for these GPUs",
            source="mlx/backend"),
        Row(FAMILIES, (), None, READ, source="mlx/ops.cpp",
            note="has integers of 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 and 128"),
    ),
    command="mlx_lm.generate --model {folder} --prompt Hello{options}",
    repository="ml-explore/mlx",
    install="pip install mlx-lm",
    installs={
        "cuda": "pip install 'mlx[cuda]' mlx-lm",
        "cpu": "pip install 'mlx[cpu]' mlx-lm",
    },
    exports=("mlx",),
    prefers=("metal",),
)  # fmt: skip
