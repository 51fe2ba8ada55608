"""Whether the quantized model repeats a single token where the original did not."""

from __future__ import annotations

from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from autoround_modifier.host.layers import is_on_disk
from autoround_modifier.host.lifecycle import eval_context
from autoround_modifier.parallel import is_distributed

__all__ = ["GenerationCheck"]

PROMPT_TOKENS = 16
NEW_TOKENS = 16


class GenerationCheck:
    """
    Made before the run, asked after it. It never fails: what cannot be checked is not.

    :param model: in full precision
    :param batches: the loader of the calibration data, of which the first sample is read
    """

    def __init__(self, model: nn.Module, batches: Any) -> None:
        self._prompt = None if _costs_much(model) else _prompt(batches)
        self._reference = self._continued(model)

    def warn_if_repeating(self, model: nn.Module) -> None:
        """
        :param model: the same one, quantized
        """
        if self._reference is None or _is_one_token(self._reference):
            return
        found = self._continued(model)
        if found is not None and _is_one_token(found):
            logger.warning(
                f"the quantized model repeats one token ({int(found[0])}) after the beginning of "
                "a calibration sample, which the original does not. It is probably not usable: use "
                "more bits or smaller groups, more calibration samples, or more iterations."
            )

    def _continued(self, model: nn.Module) -> Tensor | None:
        """:return: (new tokens,), the likeliest tokens after the prompt"""
        if self._prompt is None:
            return None
        try:
            tokens = self._prompt[None].to(next(model.parameters()).device)
            with torch.no_grad(), eval_context(model):
                for _ in range(NEW_TOKENS):
                    logits = model(input_ids=tokens, use_cache=False).logits
                    tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        except Exception as error:
            logger.debug(f"what the model generates is not checked: {error}")
            return None
        return tokens[0, len(self._prompt) :].cpu()


def _costs_much(model: nn.Module) -> bool:
    """:return: whether each token costs more than it is worth, or there is nothing to generate"""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is None or not can_generate() or is_on_disk(model) or is_distributed()


def _prompt(batches: Any) -> Tensor | None:
    """:return: the first tokens of the first sample. The loader itself is not started"""
    try:
        (ids, *_), mask = _first(batches, "input_ids"), _first(batches, "attention_mask")
        ids = ids[mask[0].bool()] if mask is not None else ids
    except Exception as error:
        logger.debug(f"what the model generates is not checked: {error}")
        return None
    return ids[:PROMPT_TOKENS] if len(ids) else None


def _first(batches: Any, field: str) -> Any:
    batch = batches.collate_fn([batches.dataset[0]])
    return batch[field] if field == "input_ids" else batch.get(field)


def _is_one_token(tokens: Tensor) -> bool:
    return bool((tokens == tokens[0]).all())
