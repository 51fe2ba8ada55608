"""The engines of which it is known what they run: one table each."""

from __future__ import annotations

from autoround_modifier.engines.auto_round_table import AUTO_ROUND
from autoround_modifier.engines.gptqmodel_table import GPTQMODEL
from autoround_modifier.engines.llama_cpp_table import LLAMA_CPP
from autoround_modifier.engines.mlx_table import MLX
from autoround_modifier.engines.openvino_table import OPENVINO
from autoround_modifier.engines.rows import EngineTable
from autoround_modifier.engines.sglang_table import SGLANG
from autoround_modifier.engines.tensorrt_llm_table import TENSORRT_LLM
from autoround_modifier.engines.transformers_table import TRANSFORMERS
from autoround_modifier.engines.vllm_table import VLLM

__all__ = ["ENGINE_TABLES", "SHOWN_ENGINES"]

# Servers before libraries, else in the order in which they are shown
ENGINE_TABLES: tuple[EngineTable, ...] = (
    VLLM,
    SGLANG,
    TENSORRT_LLM,
    LLAMA_CPP,
    MLX,
    GPTQMODEL,
    AUTO_ROUND,
    OPENVINO,
    TRANSFORMERS,
)
# In tables of all recipes and schemes, where there is no room for more
SHOWN_ENGINES = (VLLM.engine, SGLANG.engine, TRANSFORMERS.engine)
