"""Digests of what the result of a run depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.samples import content_key
from autoround_modifier.parallel import gathered
from autoround_modifier.version import __version__

__all__ = ["data_digest", "model_digest", "run_digests", "text_digest"]

SAMPLED_ELEMENTS = 2**14
QPARAM_SUFFIXES = ("_scale", "_zero_point", "_g_idx")
# Fields of recipes that do not change the result.
WITHOUT_EFFECT = ("checkpoint_dir", "enable_torch_compile")


def run_digests(model: nn.Module, modifier: Any, modifiers: list[Any]) -> dict[str, str]:
    """
    :param modifier: that tunes; a pydantic model
    :param modifiers: of the recipe, the one that tunes among them
    :return: digests of all that the result depends on but the calibration data, each under the
        name of what it is a digest of
    """
    recipe = [
        (type(x).__name__, x.model_dump(mode="json", fallback=_class_name)) for x in modifiers
    ]
    for _, fields in recipe:
        for name in WITHOUT_EFFECT:
            fields.pop(name, None)
    return {
        "version of autoround_modifier": __version__,
        "recipe": text_digest(recipe),
        # two modifiers of one recipe need a folder each
        "modifier of the recipe": str([x is modifier for x in modifiers].index(True)),
        "model": model_digest(model),
    }


def _class_name(value: object) -> str:
    return type(value).__name__


def text_digest(value: Any) -> str:
    """:return: of a JSON value"""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def model_digest(model: nn.Module) -> str:
    """
    Of the names, shapes and dtypes of all parameters, and of up to 16,384 numbers of each, evenly
    spaced: reading 671B in full would take as long as tuning several blocks. What is not read shows
    in the outputs of the blocks, which `data_digest` covers.
    """
    digest = hashlib.blake2b(digest_size=16)
    for module_name, module in model.named_modules():
        for name in module._parameters:
            if name.endswith(QPARAM_SUFFIXES) and hasattr(module, "quantization_scheme"):
                continue  # another modifier's, not filled in yet
            tensor = getattr(module, name)  # brings one that is offloaded
            if tensor is None:
                continue
            flat = tensor.detach().reshape(-1)
            stride = max(1, flat.numel() // SAMPLED_ELEMENTS)
            sample = flat[::stride].contiguous().cpu().view(torch.uint8).numpy()
            digest.update(f"{module_name}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.data)
    return digest.hexdigest()


def data_digest(
    recorded: bytes,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    masks: Iterable[Tensor | None],
) -> tuple[str, str]:
    """
    Of what blocks saw and gave.

    :param recorded: digest of all samples, used or not
    :param inputs: (1, tokens, hidden) per sample
    :param outputs: same shapes
    :param masks: (1, tokens) bool per sample, None where every token counts
    :return: of the samples of all processes, whatever their order; of those of this one
    """
    keys = [
        (content_key(x, mask) + content_key(y, mask)).hex()
        for x, y, mask in zip(inputs, outputs, masks, strict=True)
    ]
    everywhere = sorted(key for share in gathered(keys) for key in share)
    return text_digest([recorded.hex(), everywhere]), text_digest(keys)
