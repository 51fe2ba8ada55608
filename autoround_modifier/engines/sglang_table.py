"""
What SGLang 0.5.23 takes: ``python/sglang/srt/layers/quantization/compressed_tensors``. Its own
configurations, layers and weight loaders were run without a GPU (``tests/sglang``); no model was.
"""

from __future__ import annotations

from autoround_modifier.engines.support import ASKED, CHANNEL, CPU, READ, EngineTable, Row, cuda

__all__ = ["SGLANG"]

GPU = (cuda(75),)
MARLIN_GROUPS = (CHANNEL, 32, 64, 128)
BY_GROUP = ("group",)
HUMMING = "--quantization humming"
NEEDS_BUILD = "has no CPU kernels in its released packages"
NO_SCHEME = "has no scheme of these in its ordinary loader"
ONE_GROUP = f"{NO_SCHEME}, and `{HUMMING}` takes one config group that targets `Linear`"
BY_GROUP_ONLY = f"{ONE_GROUP}, integers with scales by group only"

SGLANG = EngineTable(
    engine="SGLang",
    packages=("sglang",),
    version="0.5.23",
    rows=(
        Row((
            "int", "int-int8", "int-int4", "int-fp8", "fp8", "fp8_block", "fp8a16", "mxfp4",
            "mxfp4a16", "mxfp4a8", "mxfp8", "mxfp8a16", "nvfp4", "nvfp4a16", "other",
        ), (CPU,), None, READ, note=NEEDS_BUILD),
        Row(("int",), (), None, READ, (2, 3, 5, 6, 7), experts=True,
            note="has experts of 4 and 8 bits only"),
        Row(("int",), (cuda(80),), "Marlin", ASKED, (4, 8), symmetric=True, groups=MARLIN_GROUPS),
        Row(("int",), (cuda(80),), "Marlin", ASKED, (4,), symmetric=False, groups=MARLIN_GROUPS),
        Row(("int",), GPU, "Humming", ASKED, strategies=BY_GROUP, experts=False,
            option=HUMMING, single_group=True),
        Row(("int",), GPU, None, ASKED, (4, 8),
            note="has Marlin alone: compute capability 8.0, groups of 32, 64 or 128 or by channel, "
            f"zero points at 4 bits only; `{HUMMING}` takes one config group that targets "
            "`Linear`, with scales by group"),
        Row(("int",), GPU, None, ASKED, note=BY_GROUP_ONLY),
        Row(("int-int8",), (cuda(0),), None, READ, (8,), experts=True,
            note="has experts of W8A8 integers for NPUs only"),
        Row(("int-int8",), (cuda(80),), "int8_scaled_mm", ASKED, (8,), groups=(CHANNEL,),
            formats=("int-quantized",), dynamic=True),
        Row(("int-int8",), GPU, "Humming", ASKED, (8,), groups=(CHANNEL,),
            formats=("int-quantized",), option=HUMMING, single_group=True),
        Row(("int-int8",), GPU, None, ASKED, (8,), groups=(CHANNEL,),
            formats=("int-quantized",), dynamic=False,
            note="has one static input scale for layers that it fuses, and the checkpoint one for "
            f"each; `{HUMMING}` takes one config group that targets `Linear`"),
        Row(("int-int8",), GPU, "Humming", ASKED, (4,), formats=("pack-quantized",),
            strategies=BY_GROUP, option=HUMMING, single_group=True),
        Row(("int-int8",), GPU, None, ASKED, (4,), formats=("pack-quantized",),
            note=BY_GROUP_ONLY),
        Row(("int-int8", "int-int4"), (cuda(80),), None, ASKED, note=NO_SCHEME),
        Row(("int-fp8",), GPU, "Humming", ASKED, strategies=BY_GROUP,
            option=HUMMING, single_group=True),
        Row(("int-fp8",), GPU, None, ASKED, note=BY_GROUP_ONLY),
        Row(("fp8", "fp8_block"), (cuda(89),), "scheme W8A8Fp8", ASKED),
        Row(("fp8",), (cuda(80),), "scheme W8A16Fp8", ASKED,
            note="activations stay in 16 bits"),
        Row(("fp8_block",), (cuda(0),), None, ASKED, note="needs compute capability 8.9 or higher"),
        Row(("fp8a16",), (cuda(80),), "scheme W8A16Fp8", ASKED),
        Row(("nvfp4",), (cuda(100),), "scheme W4A4Fp4", ASKED),
        Row(("nvfp4",), (cuda(80),), "Marlin", ASKED, note="activations stay in 16 bits"),
        Row(("nvfp4a16",), (cuda(80),), "Marlin", ASKED),
        Row(("fp8", "fp8a16", "nvfp4", "nvfp4a16"), GPU, "Humming", ASKED, experts=False,
            option=HUMMING, single_group=True),
        Row(("mxfp4", "mxfp4a16"), GPU, "Humming", ASKED, experts=False,
            option=HUMMING, single_group=True),
        Row(("mxfp4", "mxfp4a16", "mxfp4a8"), GPU, None, ASKED, experts=False, note=ONE_GROUP),
        Row(("mxfp8", "mxfp8a16"), (), None, ASKED, note="has no MXFP8 of compressed-tensors"),
        Row(("fp8", "fp8a16", "nvfp4", "nvfp4a16", "int", "int-int8", "int-int4"),
            (cuda(0),), None, ASKED, note="needs compute capability 8.0 or higher"),
    ),
    command="python -m sglang.launch_server --model-path {folder}{options}",
    refusal="nothing is known of this here",
)  # fmt: skip
