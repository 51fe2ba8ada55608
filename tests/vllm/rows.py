"""The table of checkpoints: one row, one checkpoint, one engine start.

Read in both environments, so it imports neither the package nor vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_LINEARS = ["Linear"]
ATTENTION = [r"re:.*self_attn\..*_proj$"]
MLP = [r"re:.*mlp\..*_proj$"]


@dataclass(frozen=True)
class Row:
    """
    One checkpoint.

    :param name: the folder it is saved in, and its line in the final table
    :param config_groups: the recipe's field of that name; None leaves the model unquantized
    :param kernel: the class that runs its layers on an x86 CPU: vLLM's own, or one of
        format_kernels.py; None for integer weights, where vLLM is asked layer by layer
    :param broken_kernel: the class that vLLM would choose, and that fails in its CPU build: by
        tensor for want of operators, by channel on the shape of a static input scale
    :param kv_cache_scheme: the recipe's field of that name
    :param tolerance: factor of the allowed gap; vLLM's CPU kernel rounds towards zero what it
        caches in FP8 (its codes are those of truncation), Transformers to nearest
    :param avg_bits: if given, AutoSchemeModifier chooses one of the groups for each layer
    """

    name: str
    config_groups: dict[str, dict] | None
    kernel: str | None = None
    broken_kernel: str | None = None
    kv_cache_scheme: dict | None = None
    tolerance: float = 1.0
    avg_bits: float | None = None

    @property
    def activations(self) -> dict | None:
        """How activations are quantized; None if they are not. One way in each row."""
        groups = (self.config_groups or {}).values()
        return next((x for group in groups if (x := group["input_activations"])), None)

    @property
    def runs_in_float32(self) -> bool:
        """Whether all that is quantized are integer weights; other formats load as bfloat16."""
        groups = (self.config_groups or {}).values()
        return not (self.activations or self.kv_cache_scheme) and all(
            group["weights"]["type"] == "int" for group in groups
        )


def group(
    num_bits: int,
    symmetric: bool = True,
    group_size: int | None = 64,
    targets: list[str] = ALL_LINEARS,
) -> dict:
    """
    :param group_size: None for one scale per output channel
    :return: one config group of integer weights
    """
    weights = {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
    }
    return {"targets": targets, "weights": weights, "input_activations": None}


def integer(num_bits: int, activations: dict, group_size: int | None = None) -> dict[str, dict]:
    """:return: config groups of integer weights with quantized activations"""
    return {"group_0": group(num_bits, group_size=group_size) | {"input_activations": activations}}


def floating(weights: dict, activations: dict | None = None) -> dict[str, dict]:
    """:return: config groups of floating-point weights"""
    scheme = {"targets": ALL_LINEARS, "weights": weights, "input_activations": activations}
    return {"group_0": scheme}


def dynamic(args: dict) -> dict:
    """:return: activations quantized like the weights, on the fly"""
    return args | {"dynamic": True}


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8_TOKEN = FLOAT8 | {"type": "int", "strategy": "token", "dynamic": True}
INT8_TENSOR = FLOAT8 | {"type": "int", "strategy": "tensor", "dynamic": False}
FP8_TOKEN = dynamic(FLOAT8 | {"strategy": "token"})
FP8_TENSOR = FLOAT8 | {"strategy": "tensor", "dynamic": False}
FP8_GROUP = dynamic(FLOAT8 | {"strategy": "group", "group_size": 64})
FP8_CHANNEL = FLOAT8 | {"strategy": "channel"}
FP8_WHOLE = FLOAT8 | {"strategy": "tensor"}
# 128 x 128 is the usual one; it does not divide the model's 576 features.
FP8_BLOCK = FLOAT8 | {"strategy": "block", "block_structure": [64, 64]}
MXFP8 = FLOAT8 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP4 = MXFP8 | {"num_bits": 4}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}

ROWS = (
    # What two engines differ by without any quantization: the yardstick for the others.
    Row("unquantized", None),
    Row("w4a16_sym_g64", {"group_0": group(4)}),
    Row("w4a16_asym_g64", {"group_0": group(4, symmetric=False)}),
    Row("w8a16_sym_channel", {"group_0": group(8, group_size=None)}),
    Row("w8a16_sym_g64", {"group_0": group(8)}),
    Row("w2a16_sym_g64", {"group_0": group(2)}),
    Row("w2a16_asym_g64", {"group_0": group(2, symmetric=False)}),
    Row("w3a16_sym_g64", {"group_0": group(3)}),
    Row(
        "mixed_attn4_mlp2_g64",
        {"group_0": group(4, targets=ATTENTION), "group_1": group(2, targets=MLP)},
    ),
    Row("autoscheme_w4_w8_g64", {"w4": group(4), "w8": group(8)}, avg_bits=5.0),
    Row("w8a8_int8_dynamic", integer(8, INT8_TOKEN), "CPUInt8ScaledMMLinearKernel"),
    Row("w8a8_int8_static", integer(8, INT8_TENSOR), "CPUInt8ScaledMMLinearKernel"),
    Row("w4a8_int8_dynamic_g64", integer(4, INT8_TOKEN, 64), "Dynamic4bitLinearKernel"),
    Row(
        "fp8_dynamic",
        floating(FP8_CHANNEL, FP8_TOKEN),
        "ChannelWiseTorchFP8ScaledMMLinearKernel",
    ),
    Row(
        "fp8_static_channel",
        floating(FP8_CHANNEL, FP8_TENSOR),
        "DequantizingFp8",
        broken_kernel="ChannelWiseTorchFP8ScaledMMLinearKernel",
    ),
    Row(
        "fp8_static",
        floating(FP8_WHOLE, FP8_TENSOR),
        "DequantizingFp8",
        broken_kernel="PerTensorTorchFP8ScaledMMLinearKernel",
    ),
    Row("fp8a16", floating(FP8_CHANNEL), "DequantizingFp8"),
    Row("fp8_block", floating(FP8_BLOCK, FP8_GROUP), "DequantizingFp8Block"),
    Row("mxfp4", floating(MXFP4, dynamic(MXFP4)), "DequantizingMxfp4"),
    Row("mxfp4a16", floating(MXFP4), "DequantizingMxfp4"),
    Row("mxfp8", floating(MXFP8, dynamic(MXFP8)), "DequantizingMxfp8"),
    Row("mxfp8a16", floating(MXFP8), "DequantizingMxfp8"),
    Row("nvfp4", floating(NVFP4, NVFP4 | {"dynamic": "local"}), "DequantizingNvfp4"),
    Row("nvfp4a16", floating(NVFP4), "DequantizingNvfp4"),
    Row(
        "w4a16_fp8_kv",
        {"group_0": group(4)},
        "CPUWNA16LinearKernel",
        kv_cache_scheme=FP8_TENSOR,
        tolerance=3.0,
    ),
)
