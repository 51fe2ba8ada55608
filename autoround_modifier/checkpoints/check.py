"""Whether engines will load what a recipe saves: before the run, and once it is saved."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from loguru import logger
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from autoround_modifier.checkpoints.saved_files import read_layout
from autoround_modifier.engines.check import (
    find_problems,
    problems_of_names,
    required_engines,
)
from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.engines.problem import Problem
from autoround_modifier.errors import RecipeError
from autoround_modifier.host.layers import as_single_threaded
from autoround_modifier.host.prediction import predict_layout
from autoround_modifier.host.saved_names import name_experts_as_released
from autoround_modifier.host.schemes import QuantizationConfig

__all__ = ["check_before_saving", "check_checkpoint", "check_saved", "problems_of_layout"]


def check_checkpoint(folder: str | os.PathLike[str], engine: str = "any") -> list[Problem]:
    """
    Check a compressed-tensors checkpoint without loading its weights: whether Transformers' loader
    finds each tensor that it expects, and none that it does not; whether vLLM gives each layer the
    scheme that it was saved with, and one to layers that it fuses; whether they read its experts.

    :param folder: of any checkpoint in a compressed-tensors format
    :param engine: whose problems to look for: ``vllm``, ``transformers`` or ``any``
    :return: what is wrong, for each engine; nothing where all is well
    :raises CheckpointError: if a file cannot be read, or is not there
    :raises ValueError: if there is no such engine
    """
    required = required_engines(engine)
    problems = problems_of_layout(Path(folder), read_layout(Path(folder)))
    return [problem for name in required for problem in problems.get(name, ())]


def problems_of_layout(folder: Path, layout: CheckpointLayout) -> dict[str, list[Problem]]:
    """
    :param folder: of a checkpoint
    :param layout: of its tensors
    :return: engine -> what is wrong; without Transformers, and with a warning, where it does not
        know the model without code from the checkpoint
    """
    try:
        # Without the argument Transformers would ask on the terminal.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # code of its own, or a type that is not known here
        logger.warning(f"not checked for Transformers: {error}")
        return problems_of_names(layout)
    return find_problems(layout, config=config)


def check_before_saving(
    model: nn.Module, configs: Iterable[QuantizationConfig], engine: str
) -> None:
    """
    Names, shapes and schemes of what will be saved are known before the run, and so is what each
    engine will make of them.

    :param model: before it is quantized; experts are given the names under which they are saved
    :param configs: of the modifiers of the recipe that quantize, in their order; none where
        dequantized weights are saved, beside blocks of GGUF
    :param engine: which must load the checkpoint; problems of others are logged
    :raises RecipeError: if it will not, or will read another model
    """
    if not isinstance(model, PreTrainedModel):
        return
    name_experts_as_released(model)
    configs = list(configs)
    try:
        problems = _expected_problems(model, configs)
    except RecipeError:
        raise
    except Exception as error:  # a run that could succeed is not stopped by what only checks it
        logger.warning(
            "what this recipe will save could not be checked before the run "
            f"({type(error).__name__}: {error})"
        )
        return
    required = required_engines(engine)
    refused = [x for name in required for x in problems[name] if x.fatal]
    if not configs:  # no engine is the remedy: llama.cpp's converter reads the release's form alone
        refused = [replace(x, remedy="") for x in refused]
    if refused:
        raise RecipeError(
            "this recipe would save a checkpoint that does not load, or loads as another model:\n  "
            + "\n  ".join(map(str, refused))
        )
    for name, found in problems.items():
        for problem in found:
            said = problem if name in required else replace(problem, remedy="")
            logger.warning(f"the checkpoint: {said}")


def check_saved(model: PreTrainedModel, folder: Path, engine: str) -> None:
    """
    Log what is wrong with a saved checkpoint. Nothing is raised: the files are there, and may be
    all that is left of a long run.

    :param engine: which must load the checkpoint
    """
    try:
        layout = read_layout(folder)
        with as_single_threaded():  # one process checks, and others wait
            problems = find_problems(layout, type(model), model.config)
    except Exception as error:
        logger.error(f"the saved checkpoint could not be checked: {error!r}")
        return
    for name in required_engines(engine):
        for problem in problems[name]:
            if problem.fatal:
                logger.error(f"the saved checkpoint: {problem}")


def _expected_problems(
    model: PreTrainedModel, configs: Iterable[QuantizationConfig]
) -> dict[str, list[Problem]]:
    layout = predict_layout(model, configs)
    config = copy.deepcopy(model.config)
    if "tie_word_embeddings" in layout.config:  # no more, if one of them is quantized
        config.tie_word_embeddings = layout.config["tie_word_embeddings"]
    with as_single_threaded():
        return find_problems(layout, type(model), config)
