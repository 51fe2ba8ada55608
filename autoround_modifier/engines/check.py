"""Which of the engines read a checkpoint as it is meant."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.engines.problem import Problem
from autoround_modifier.engines.transformers_loader import transformers_problems
from autoround_modifier.engines.vllm_loader import vllm_problems

__all__ = ["ENGINES", "find_problems"]

# What `engine` may be: one of them, or all
ENGINES = ("any", "vllm", "transformers")


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
        "vllm": vllm_problems(layout),
    }
