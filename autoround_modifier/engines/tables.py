"""The engines of which it is known what they run: one table each."""

from __future__ import annotations

from autoround_modifier.engines.sglang_table import SGLANG
from autoround_modifier.engines.support import EngineTable
from autoround_modifier.engines.transformers_table import TRANSFORMERS
from autoround_modifier.engines.vllm_table import VLLM

__all__ = ["ENGINE_TABLES"]

ENGINE_TABLES: tuple[EngineTable, ...] = (VLLM, SGLANG, TRANSFORMERS)
