"""
The kernels of llama.cpp (ggml 0.25, as in llama-cpp-python 0.3.36) for the types of GGUF to which
integers are exported, and for those that weights are tuned in. On CPUs exported files were run; the
rest was read. All kernels quantize activations to 8 bits in blocks, as llama.cpp always does.
"""

from __future__ import annotations

from typing import Any

from autoround_modifier.engines.hardware import CPU, METAL, ROCM, XPU, Where, cuda
from autoround_modifier.engines.rows import READ, RUN, EngineTable, Row
from autoround_modifier.engines.scheme import FAMILIES
from autoround_modifier.gguf_schemes import GGUF_SCHEMES

__all__ = ["LLAMA_CPP"]

CUDA_SOURCE = "ggml/src/ggml-cuda/mmvq.cu"
METAL_SOURCE = "ggml/src/ggml-metal/ggml-metal-device.cpp"
SYCL_SOURCE = "ggml/src/ggml-sycl/mmvq.cpp"
CPU_SOURCE = "ggml/src/ggml-cpu/arch/x86/quants.c"
GENERIC_SOURCE = "ggml/src/ggml-cpu/quants.c"
GPU = (cuda(50), ROCM)
SLOW_ON_X86 = "slow on x86, without vector instructions; gguf:q4_0 has them, in 4.5 bits"
CLONE = "git clone https://github.com/ggml-org/llama.cpp"
BUILD = "cmake -S llama.cpp -B build"


def _type(
    name: str,
    bits: tuple[int, ...],
    zero_points: tuple[int, ...],
    block: int,
    family: str = "int",
    without: tuple[Where, ...] = (),
    note: str = "",
) -> tuple[Row, ...]:
    """
    :param name: of a type of GGUF
    :param bits: of integers that it holds
    :param zero_points: of integers with zero points that it holds
    :param block: input features that share a scale in the file
    :param family: of schemes that it holds
    :param without: platforms without a kernel
    :param note: on x86 CPUs
    """
    fit: dict[str, Any] = {"export": f"gguf:{name.lower()}", "in_multiple": block}
    if family == "int":
        fit["group_multiple"] = block
    held = [(True, bits), (False, zero_points)] if family == "int" else [(None, ())]
    platforms = _platforms(GENERIC_SOURCE if note else CPU_SOURCE)
    return tuple(
        Row(
            (family,),
            on,
            f"ggml {name}, {platform}",
            known,
            numbers,
            symmetric=symmetric,
            source=source,
            note=note if on == (CPU,) else "",
            **fit,
        )
        for on, platform, known, source in platforms
        if not set(on) & set(without)
        for symmetric, numbers in held
        if numbers or family != "int"
    )


def _platforms(cpu_source: str) -> tuple[tuple[tuple[Where, ...], str, str, str], ...]:
    """:return: hardware, its name, how its kernels are known, and their source"""
    return (
        (GPU, "CUDA", READ, CUDA_SOURCE),
        ((METAL,), "Metal", READ, METAL_SOURCE),
        ((XPU,), "SYCL or Vulkan", READ, SYCL_SOURCE),
        ((CPU,), "CPU", RUN, cpu_source),
    )


def _tuned(scheme: str) -> tuple[Row, ...]:
    """:param scheme: of GGUF, that weights are tuned in; its file is of no other one"""
    return tuple(
        Row(("gguf",), on, f"ggml {scheme.removeprefix('gguf:').upper()}, {platform}", known,
            formats=(scheme,), export=scheme, source=source)
        for on, platform, known, source in _platforms(CPU_SOURCE)
    )  # fmt: skip


LLAMA_CPP = EngineTable(
    engine="llama.cpp",
    packages=(),
    version="ggml 0.25",
    rows=(
        *_type("Q2_0", (2,), (), 64, note=SLOW_ON_X86),
        *_type("TQ2_0", (2,), (), 256, without=GPU),
        *_type("Q4_0", (2, 3, 4), (2, 3), 32),
        *_type("Q5_0", (2, 3, 4, 5), (2, 3, 4), 32),
        *_type("Q8_0", (2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 5, 6, 7), 32),
        *_type("MXFP4", (), (), 32, family="mxfp4a16"),
        *_type("NVFP4", (), (), 64, family="nvfp4a16", without=(METAL,)),
        *(row for scheme in GGUF_SCHEMES for row in _tuned(scheme)),
        Row(FAMILIES, (), None, READ, note="no type of GGUF holds these without a change",
            source="gguf-py/gguf/constants.py"),
    ),
    command="llama-cli -m {folder}{options}",
    repository="ggml-org/llama.cpp",
    install="brew install llama.cpp",
    installs={
        platform: f"{CLONE} && {BUILD} -DGGML_{backend}=ON && cmake --build build"
        for platform, backend in (("cuda", "CUDA"), ("rocm", "HIP"), ("xpu", "VULKAN"))
    },
    programs=("llama-cli", "llama-server"),
    exports=(
        "gguf:q2_0", "gguf:tq2_0", "gguf:q4_0", "gguf:q5_0", "gguf:q8_0", "gguf:mxfp4",
        "gguf:nvfp4", "gguf:auto", *GGUF_SCHEMES,
    ),
    export_note="needs llama.cpp's source (LLAMA_CPP_ROOT)",
)  # fmt: skip
