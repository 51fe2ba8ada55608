"""
The kernels of GPTQModel 7.7 for the formats GPTQ and AWQ, by its priorities: the classes in
``nn_modules/qlinear`` and what they say of bits, groups, features and dtypes. Those of CPUs were
run on exported checkpoints; the rest was read. Transformers loads these formats through GPTQModel.
"""

from __future__ import annotations

from typing import Any

from autoround_modifier.engines.hardware import CPU, METAL, ROCM, XPU, cuda
from autoround_modifier.engines.rows import CHANNEL, READ, RUN, EngineTable, Row
from autoround_modifier.engines.scheme import FAMILIES

__all__ = ["GPTQMODEL"]

FOLDER = "gptqmodel/nn_modules/qlinear"
HALF = ("bfloat16", "float16")
MARLIN_GROUPS = (CHANNEL, 32, 64, 128)
TORCH_GROUPS = (CHANNEL, 16, 32, 64, 128, 256, 512, 1024)
AWQ_GROUPS = (CHANNEL, 16, 32, 64, 128)
BY_CHANNEL = (
    "chooses a kernel (TorchFused) that takes no more than 256 input features per scale; "
    "GPTQModel.load(..., backend=BACKEND.GPTQ_TORCH) runs it"
)
LOAD = """\
from gptqmodel import GPTQModel
model = GPTQModel.load({path!r})"""


def _kernel(
    file: str, kernel: str | None, on: tuple[Any, ...], export: str, known: str = READ, **fit: Any
) -> Row:
    """:param file: in `FOLDER`"""
    fit.setdefault("bits", (4,))
    return Row(("int",), on, kernel, known, export=export, source=f"{FOLDER}/{file}.py", **fit)


GPTQ = (
    _kernel("swordfish", "Swordfish", (cuda(100, 119),), "gptq", bits=(4, 8), symmetric=True,
            groups=MARLIN_GROUPS, out_multiple=64, in_multiple=64, dtypes=HALF),
    _kernel("machete", "Machete", (cuda(90, 90),), "gptq", bits=(4, 8), symmetric=True,
            groups=(CHANNEL, 64, 128), out_multiple=128, in_multiple=64, dtypes=HALF),
    _kernel("marlin", "Marlin", (cuda(80),), "gptq", bits=(4, 8), symmetric=True,
            groups=MARLIN_GROUPS, dtypes=HALF),
    _kernel("marlin", "Marlin", (cuda(75, 79),), "gptq", bits=(4, 8), symmetric=True,
            groups=MARLIN_GROUPS, dtypes=("float16",)),
    _kernel("exllamav2", "ExLlamaV2", (cuda(75),), "gptq", groups=MARLIN_GROUPS, out_multiple=32,
            in_multiple=32, dtypes=HALF),
    _kernel("tritonv2", "TritonV2", (cuda(75),), "gptq", bits=(2, 4, 8), groups=TORCH_GROUPS,
            out_multiple=32, in_multiple=32, dtypes=HALF),
    _kernel("torch_cpu_avx512", "TorchCpuAvx512", (CPU,), "gptq", RUN,
            groups=(16, 32, 64, 128, 256, 512), out_multiple=32, in_multiple=2,
            dtypes=("bfloat16",), note="with AVX-512; other CPUs have TorchAten or TorchFused"),
    _kernel("torch_aten_kernel", "TorchAten", (CPU,), "gptq", groups=(32, 64, 128, 256),
            dtypes=HALF),
    _kernel("torch_fused", "TorchFused", (CPU,), "gptq", RUN, groups=AWQ_GROUPS[1:]),
    _kernel("torch_fused", None, (CPU,), "gptq", RUN, groups=(CHANNEL,), note=BY_CHANNEL),
    _kernel("torch_fused", "TorchFused", (XPU,), "gptq", groups=AWQ_GROUPS),
    _kernel("mlx", "MLX", (METAL,), "gptq", bits=(2, 3, 4, 8), groups=TORCH_GROUPS,
            out_multiple=32, in_multiple=32, dtypes=("float16",), package="mlx"),
    _kernel("torch", "Torch", (CPU,), "gptq", RUN, bits=(2, 3, 4, 8), groups=TORCH_GROUPS,
            dtypes=HALF, note="dequantizes each weight when it is used"),
    _kernel("torch", "Torch", (cuda(0), ROCM, XPU, METAL), "gptq", bits=(2, 3, 4, 8),
            groups=TORCH_GROUPS, dtypes=HALF, note="dequantizes each weight when it is used"),
)  # fmt: skip

AWQ = (
    _kernel("swordfish", "AwqSwordfish", (cuda(100, 119),), "awq", groups=MARLIN_GROUPS,
            out_multiple=64, in_multiple=64, dtypes=HALF),
    _kernel("machete_awq", "AwqMachete", (cuda(90, 90),), "awq", groups=MARLIN_GROUPS,
            out_multiple=128, in_multiple=64, dtypes=HALF),
    _kernel("marlin_awq", "AwqMarlin", (cuda(80),), "awq", groups=MARLIN_GROUPS, dtypes=HALF),
    _kernel("exllamav2_awq", "AwqExLlamaV2", (cuda(75),), "awq", groups=MARLIN_GROUPS,
            out_multiple=32, in_multiple=32, dtypes=HALF),
    _kernel("gemm_awq", "AwqGEMM", (cuda(75),), "awq", groups=AWQ_GROUPS, dtypes=HALF),
    _kernel("gemm_awq_triton", "AwqGEMMTriton", (ROCM,), "awq", groups=MARLIN_GROUPS,
            out_multiple=8, in_multiple=32, dtypes=("float16",)),
    _kernel("torch_cpu_avx512_awq", "TorchCpuAvx512Awq", (CPU,), "awq", RUN,
            groups=(16, 32, 64, 128, 256, 512), out_multiple=32, in_multiple=2,
            dtypes=("bfloat16",), note="with AVX-512; other CPUs have TorchAtenAwq"),
    _kernel("torch_aten_kernel_awq", "TorchAtenAwq", (CPU,), "awq", groups=(32, 64, 128, 256),
            dtypes=HALF),
    _kernel("torch_fused_awq", "TorchFusedAwq", (CPU,), "awq", RUN, groups=AWQ_GROUPS[1:]),
    _kernel("torch_fused_awq", None, (CPU,), "awq", RUN, groups=(CHANNEL,), note=BY_CHANNEL),
    _kernel("torch_fused_awq", "TorchFusedAwq", (XPU,), "awq", groups=AWQ_GROUPS),
    _kernel("torch_awq", "AwqTorch", (), "awq", groups=AWQ_GROUPS, out_multiple=8, dtypes=HALF,
            note="dequantizes each weight when it is used"),
)  # fmt: skip

GPTQMODEL = EngineTable(
    engine="GPTQModel",
    packages=("gptqmodel",),
    version="7.7",
    rows=(
        Row(("int",), (), None, READ, experts=True, source=f"{FOLDER}/__init__.py",
            note="experts are not exported to GPTQ and AWQ yet"),
        *GPTQ,
        *AWQ,
        Row(FAMILIES, (), None, READ, note="has no kernel for such integers and groups",
            source=f"{FOLDER}/__init__.py"),
    ),
    command=LOAD,
    repository="ModelCloud/GPTQModel",
    install="pip install gptqmodel",
    exports=("gptq", "awq"),
)  # fmt: skip
