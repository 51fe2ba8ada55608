"""Which of the engines read a checkpoint as it is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.engines.problem import Problem
from autoround_modifier.engines.sglang_loader import sglang_problems
from autoround_modifier.engines.transformers_loader import (
    transformers_experts,
    transformers_problems,
)
from autoround_modifier.engines.vllm_loader import vllm_experts, vllm_problems
from autoround_modifier.fields import ENGINES

__all__ = ["find_problems", "problems_of_names", "required_engines", "unreadable_experts"]


def required_engines(engine: str) -> tuple[str, ...]:
    """
    :param engine: one of `fields.ENGINES`
    :return: the engines that must load a checkpoint
    :raises ValueError: if there is no such engine
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine `{engine}`; use one of {', '.join(ENGINES)}")
    return {"any": ("vllm", "transformers"), "none": ()}.get(engine, (engine,))


def unreadable_experts(group: Mapping[str, Any], engine: str) -> list[Problem]:
    """
    :param group: config group of the experts of a mixture, with its ``format``
    :param engine: one of `fields.ENGINES`
    :return: what the engines that must load the checkpoint cannot do with it
    """
    rules = {"transformers": transformers_experts, "vllm": vllm_experts}
    found = (rules[name](group) for name in required_engines(engine))
    return [problem for problem in found if problem is not None]


def find_problems(
    layout: CheckpointLayout,
    model_class: type[PreTrainedModel] | None = None,
    config: PretrainedConfig | None = None,
) -> dict[str, list[Problem]]:
    """
    :param layout: of a checkpoint that was or will be saved
    :param model_class: that Transformers will load it with; None for the one that its config names
    :param config: of the model; None for that of the layout
    :return: engine -> what is wrong, empty where nothing is
    """
    return {
        "transformers": transformers_problems(layout, model_class, config),
        **problems_of_names(layout),
    }


def problems_of_names(layout: CheckpointLayout) -> dict[str, list[Problem]]:
    """
    :param layout: of a checkpoint that was or will be saved
    :return: engine -> what is wrong, of engines whose rules need no code of the model
    """
    return {"vllm": vllm_problems(layout), "sglang": sglang_problems(layout)}
