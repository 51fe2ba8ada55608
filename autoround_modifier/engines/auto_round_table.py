"""
The backends of auto-round 0.16 for its own format, by its priorities:
``auto_round/inference/backend.py``. Transformers calls them once `auto_round` is installed. Those
of CPUs were run on exported checkpoints; the rest was read.
"""

from __future__ import annotations

from typing import Any

from autoround_modifier.engines.hardware import CPU, METAL, ROCM, XPU, cuda
from autoround_modifier.engines.rows import CHANNEL, READ, RUN, EngineTable, Row, from_file
from autoround_modifier.engines.scheme import FAMILIES

__all__ = ["AUTO_ROUND"]

GPU = (cuda(75),)
HALF = ("bfloat16", "float16")
MARLIN_GROUPS = (CHANNEL, 32, 64, 128)
DIVIDED: dict[str, Any] = {"out_multiple": 32, "in_multiple": 32}
ARK, GPTQMODEL = "auto-round-lib", "gptqmodel"
HUMMING = "git+https://github.com/inclusionAI/humming.git"
SLOW = "dequantizes each weight when it is used"
LOAD = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r}, device_map="auto")"""

AUTO_ROUND = EngineTable(
    engine="auto-round",
    packages=("auto-round",),
    version="0.16",
    rows=from_file(
        "auto_round/inference/backend.py",
        Row(("int",), (), None, READ, experts=True,
            note="experts are not exported to auto_round yet"),
        Row(("int",), GPU, "gptqmodel:marlin", READ, (4, 8), symmetric=True, groups=MARLIN_GROUPS,
            out_multiple=64, dtypes=HALF, export="auto_round", package=GPTQMODEL),
        Row(("int",), GPU, "gptqmodel:exllamav2", READ, (4,), groups=MARLIN_GROUPS, dtypes=HALF,
            export="auto_round", package=GPTQMODEL, **DIVIDED),
        Row(("int",), GPU, "auto_round:humming", READ, (2, 3, 4, 8), dtypes=HALF,
            export="auto_round", package=HUMMING, **DIVIDED),
        Row(("int",), GPU, "auto_round:tritonv2", READ, (2, 8), dtypes=HALF, export="auto_round",
            **DIVIDED),
        Row(("int",), GPU, "auto_round:tritonv2", READ, (4,), symmetric=True, dtypes=HALF,
            export="auto_round", **DIVIDED),
        Row(("int",), (CPU,), "auto_round_kernel", RUN, (2, 4, 8), export="auto_round",
            package=ARK),
        Row(("int",), (XPU,), "auto_round_kernel", READ, (4, 8), symmetric=True,
            export="auto_round", package=ARK),
        Row(("int",), (XPU,), "auto_round:tritonv2", READ, (2, 8), dtypes=HALF,
            export="auto_round", **DIVIDED),
        Row(("int",), (METAL,), "mlx", READ, (2, 3, 8), groups=(CHANNEL, 32, 64, 128, 256, 512),
            export="auto_round", package="mlx"),
        Row(("int",), (METAL,), "mlx", READ, (4,), symmetric=True,
            groups=(CHANNEL, 32, 64, 128, 256, 512), export="auto_round", package="mlx"),
        Row(("int",), (CPU,), "auto_round:torch", RUN, (2, 3, 8), dtypes=HALF, note=SLOW,
            export="auto_round", **DIVIDED),
        Row(("int",), (CPU,), "auto_round:torch", RUN, (4,), symmetric=True, dtypes=HALF,
            note=SLOW, export="auto_round", **DIVIDED),
        Row(("int",), (CPU,), "gptqmodel:awq_torch", RUN, (4,), symmetric=False,
            groups=(CHANNEL, 16, 32, 64, 128), out_multiple=16, in_multiple=16, note=SLOW,
            export="auto_round", package=GPTQMODEL),
        Row(("int",), (cuda(0), XPU), "auto_round:torch", READ, (2, 3, 8), dtypes=HALF, note=SLOW,
            export="auto_round", **DIVIDED),
        Row(("int",), (cuda(0), XPU), "auto_round:torch", READ, (4,), symmetric=True, dtypes=HALF,
            note=SLOW, export="auto_round", **DIVIDED),
        Row(("int",), GPU, "gptqmodel:awq_torch", READ, (4,), symmetric=False,
            groups=(CHANNEL, 16, 32, 64, 128), out_multiple=16, in_multiple=16, note=SLOW,
            export="auto_round", package=GPTQMODEL),
        Row(("int",), (ROCM,), None, READ, note="names no backend for AMD GPUs"),
        Row(FAMILIES, (), None, READ, note="has no backend for such integers, groups and shapes"),
    ),
    command=LOAD,
    repository="intel/auto-round",
    install="pip install auto-round",
    exports=("auto_round",),
)  # fmt: skip
