"""What Transformers makes of a checkpoint: its own loader, run on the meta device."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, conversion_mapping
from transformers.utils import logging

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.engines.matching import Names, Targets, groups_of
from autoround_modifier.engines.problem import Problem

__all__ = ["NAME", "fuses_experts", "transformers_experts", "transformers_problems"]

NAME = f"Transformers {transformers.__version__}"
ONLY_VLLM = "Set `engine: vllm` if the checkpoint is for vLLM only."
OR_ELSE = "Or set `engine: vllm`, if the checkpoint is for vLLM only."
SCALE = ".weight_scale"
# Architectures that load and stop in their first forward pass, by model type: docs/upstream
_DOES_NOT_RUN = {
    "ctrl": "runs no quantized CTRL: its layer norms get hidden states of another dtype",
}


def transformers_problems(
    layout: CheckpointLayout,
    model_class: type[PreTrainedModel] | None = None,
    config: PretrainedConfig | None = None,
) -> list[Problem]:
    """
    :param layout: of a checkpoint that was or will be saved
    :param model_class: that will load it; None for the one that its config names. Nothing is found
        where Transformers has no such class
    :param config: of the model; None for that of the layout
    :return: why Transformers will not load it, or load it as another model
    """
    model_class = model_class or _named_class(layout)
    if model_class is None:
        return []
    if config is None:
        fields = {k: v for k, v in layout.config.items() if k != "quantization_config"}
        config = AutoConfig.for_model(**fields)
    reason = _DOES_NOT_RUN.get(str(layout.config.get("model_type")))
    if reason is not None and layout.quantization:
        return [Problem(NAME, reason, (), ONLY_VLLM)]
    with _quiet(), _own_conversions():
        problems = list(_expert_problems(layout, model_class, config))
        if not any(problem.fatal for problem in problems):
            problems += _loading_problems(layout, model_class, config)
    return problems


def fuses_experts(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """:return: whether the model, as Transformers makes it, holds experts in one tensor"""
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config))
    return any(
        name.rpartition(".")[2] == "experts"
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        for name, module in model.named_modules()
    )


def transformers_experts(group: Mapping[str, Any]) -> Problem | None:
    """
    Experts are decompressed as they are loaded, and fused, by
    `transformers.integrations.compressed_tensors.DecompressExperts`.

    :param group: config group of experts
    :return: what Transformers cannot do with it; None if it reads them exactly
    """
    weights = group["weights"]
    what = remedy = None
    if weights is None:
        return None
    if weights["type"] == "int" and not weights["symmetric"]:
        what, remedy = "does not read experts with zero points", "Use symmetric weights for them."
    elif weights["type"] == "int" and group.get("format") not in (None, "pack-quantized"):
        what, remedy = "reads packed experts only, not W8A8 or W4A8", "Use W8A16 or W4A16 for them."
    elif weights["strategy"] == "tensor_group":
        what, remedy = "drops the global scales of NVFP4 experts", "Use MXFP4 or W4A16 for them."
    elif weights["num_bits"] == 8 and weights["type"] == "float":
        if str(weights.get("scale_dtype")).endswith("uint8"):
            what, remedy = "does not read MXFP8 experts", "Use FP8 by channel or W8A16 for them."
        elif weights["strategy"] not in ("tensor", "channel"):
            what, remedy = "does not read FP8 experts by block or group", "Use FP8 by channel."
    if what is not None:
        return Problem(NAME, what, (), f"{remedy} {OR_ELSE}")
    if group.get("input_activations") is not None:
        return Problem(NAME, "computes experts without quantizing their activations", fatal=False)
    return None


def _named_class(layout: CheckpointLayout) -> type[PreTrainedModel] | None:
    """:return: the class of the architecture; None if it is not one of Transformers'"""
    names = layout.config.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _expert_problems(
    layout: CheckpointLayout, model_class: type[PreTrainedModel], config: PretrainedConfig
) -> Iterator[Problem]:
    groups = groups_of(layout.quantization)
    targets = Targets(groups)
    ignore = Names(layout.quantization.get("ignore") or [])
    experts = {
        name.rpartition(".weight")[0]
        for name in layout.tensors
        if EXPERT.search(name) and ".weight" in name
    }
    if not groups or not experts or not fuses_experts(model_class, config):
        return
    quantized = {name for name in experts if f"{name}{SCALE}" in layout.tensors}
    by_group: dict[str | None, set[str]] = {}
    for name in quantized:
        group = None if name in ignore else targets.compressed_tensors(name, "Linear")
        by_group.setdefault(group, set()).add(EXPERT.sub("*", name))
    settings = layout.quantization["config_groups"]
    if len(by_group) > 1:
        yield Problem(
            NAME,
            f"reads all experts of a model by one scheme, and these have {len(by_group)}",
            tuple(min(names) for names in by_group.values()),
            f"Give the experts of all blocks one scheme. {OR_ELSE}",
        )
        return
    for group, names in by_group.items():
        problem = None if group is None else transformers_experts(settings[group])
        if problem is not None:
            yield replace(problem, names=tuple(sorted(names)))
    plain = experts - quantized
    if plain and (quantized or not _reads_plain_experts(settings)):
        yield Problem(
            NAME,
            "does not read experts that are not quantized in a model of which other layers are",
            tuple(sorted({EXPERT.sub("*", name) for name in plain})),
            f"Quantize all experts, to 8 bits if they are to stay precise. {OR_ELSE}",
        )


def _reads_plain_experts(settings: Mapping[str, Any]) -> bool:
    """:return: whether the group by which Transformers reads experts is FP8, which is not packed"""
    chosen = next(
        (
            group
            for group in settings.values()
            if any(x.startswith("re:") and "experts" in x for x in group["targets"])
        ),
        next(
            (x for x in settings.values() if any(not y.startswith("re:") for y in x["targets"])),
            next(iter(settings.values())),
        ),
    )
    weights = chosen["weights"]
    return bool(weights and weights["type"] == "float" and weights["num_bits"] == 8)


def _loading_problems(
    layout: CheckpointLayout, model_class: type[PreTrainedModel], config: PretrainedConfig
) -> Iterator[Problem]:
    config = copy.deepcopy(config)
    if layout.quantization:
        config.quantization_config = copy.deepcopy(layout.quantization)
    tensors = {
        name: torch.empty(x.shape, dtype=x.dtype, device="meta")
        for name, x in layout.tensors.items()
    }
    try:
        load: Any = model_class.from_pretrained
        model, info = load(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
        )
    except Exception as error:  # whatever its loader raises, the user would meet
        lines = str(error).strip().splitlines() or [""]
        if re.search("has no attribute .weight", lines[0]):
            what = (
                "does not load the checkpoint: it initializes the weights of layers that are "
                f"packed in this architecture ({lines[0]})"
            )
        else:
            what = f"does not load the checkpoint: {type(error).__name__}: {lines[0]}"
        yield Problem(NAME, what, (), ONLY_VLLM)
        return
    missing = sorted(name for name in info["missing_keys"] if not _is_tied(model, name))
    unexpected = sorted(info["unexpected_keys"])
    different = sorted(str(x[0]) for x in info.get("mismatched_keys") or ())
    if any(".experts." in x for x in missing) and any(EXPERT.search(x) for x in unexpected):
        yield Problem(
            NAME,
            "reads the experts of this architecture from one tensor only, so that they would be "
            "random",
            tuple(name for name in missing if ".experts." in name),
            ONLY_VLLM,
        )
        return
    for names, what in (
        (missing, "does not find tensors in the checkpoint, which would be random"),
        (unexpected, "has no place for tensors of the checkpoint"),
        (different, "expects other shapes of tensors"),
    ):
        if names:
            yield Problem(NAME, what, tuple(names), ONLY_VLLM)


def _is_tied(model: nn.Module, name: str) -> bool:
    return name in (getattr(model, "all_tied_weights_keys", None) or {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and reports of a loading that nobody sees."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _own_conversions() -> Iterator[None]:
    """
    The conversions of Transformers itself: LLM-Compressor replaces some in the running process,
    which another process that loads the checkpoint does not know.
    """
    own = dict(_unchanged_conversions())  # what is registered meanwhile goes with the copy
    with mock.patch.object(conversion_mapping, "_checkpoint_conversion_mapping_cache", own):
        yield


@functools.cache
def _unchanged_conversions() -> dict[str, Any]:
    """:return: by types of models; their use copies them"""
    return cast(dict[str, Any], conversion_mapping._build_checkpoint_conversion_mapping())
