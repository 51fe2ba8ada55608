"""Loads one of the two models that are compared."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from autoround_modifier.errors import EvaluationError
from autoround_modifier.host.loading import (
    DEQUANTIZED_FORMATS,
    auto_class,
    load_model,
    model_positions,
    source_config,
    stored_format,
)

__all__ = ["check_models", "free_memory", "load", "load_tokenizer"]


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """
    :param name: folder, or name on the Hub
    :raises EvaluationError: if it has no tokenizer, or one whose code is not trusted
    :raises OSError: if there is no such model
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise EvaluationError(_not_loaded(f"the tokenizer of {name}", error)) from error


def _not_loaded(what: str, error: ValueError) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{what} cannot be loaded: {reason}"


def check_models(names: Iterable[str], trust_remote_code: bool) -> int | None:
    """
    Nothing but their configs is read.

    :param names: folders, or names on the Hub
    :return: the longest text, in tokens, that all of them have positions for; None if unlimited
    :raises EvaluationError: if Transformers knows one of them as no language model
    :raises OSError: if there is no such model
    """
    positions = []
    for name in names:
        config = source_config(name)
        if not config:
            raise EvaluationError(f"{name} has no config.json: it is no model")
        if "auto_map" in config:  # code of its own says what it is
            if not trust_remote_code:
                raise EvaluationError(
                    f"{name} has code of its own, which is not run unless you trust it: read it, "
                    "and add --trust-remote-code"
                )
            continue
        kind = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if type(kind) not in auto_class(config)._model_mapping:
            raise EvaluationError(
                f"{name}: Transformers has no language model of the type `{kind.model_type}`"
            )
        positions.append(model_positions(kind))
    return min(filter(None, positions), default=None)


def load(name: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """
    A model on the accelerators, if there are any. One that is released in FP8 or MXFP4 is
    dequantized.

    :param name: folder, or name on the Hub
    :param dtype: of the weights in memory; ``auto`` for that of the checkpoint
    :param trust_remote_code: let a model run its own code
    :raises OSError: if there is no such model
    """
    config = source_config(name)
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if torch.accelerator.is_available():
        arguments["device_map"] = "auto"
    if stored_format(config, name) in DEQUANTIZED_FORMATS:
        return load_model(name, **arguments).eval()
    return auto_class(config).from_pretrained(name, **arguments).eval()


def free_memory() -> None:
    """Let another model take the place of one that nothing refers to any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
