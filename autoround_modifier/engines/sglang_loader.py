"""
The rules by which SGLang 0.5.23 finds the scheme of a layer that it fuses, on names alone.

It looks for the name of the fused layer in ``targets`` and ``ignore``, then for its class, and then
for the names of the layers of the checkpoint, if its class says in ``packed_modules_mapping`` which
these are. Rewritten from `should_ignore_layer` and `find_matched_target` of
``python/sglang/srt/layers/quantization/compressed_tensors/utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.engines.fused import LOOKED_UP, fused_parts
from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.engines.matching import Names, Targets, groups_of
from autoround_modifier.engines.problem import Problem

__all__ = ["SAYING", "SILENT", "sglang_problems"]

NAME = "SGLang"
# Classes of `python/sglang/srt/models` that fuse q_proj, k_proj and v_proj, and gate_proj and
# up_proj where there are any: without `packed_modules_mapping`
SILENT = (
    "AfmoeForCausalLM",
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "OlmoForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
# and with it, for both
SAYING = (
    "Cohere2MoeForCausalLM",
    "DeciLMForCausalLM",
    "Ernie4_5_ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Exaone4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "Qwen3MoeForCausalLM",
)


def sglang_problems(layout: CheckpointLayout) -> list[Problem]:
    """
    :param layout: of a checkpoint that was or will be saved
    :return: why SGLang will refuse layers that it fuses, or read them as others; nothing where it
        is not known what its class fuses
    """
    architecture = next(iter(layout.config.get("architectures") or ()), None)
    if architecture not in SILENT + SAYING or not layout.quantization.get("config_groups"):
        return []
    return list(_fused_problems(layout, architecture in SAYING))


def _fused_problems(layout: CheckpointLayout, says: bool) -> Iterator[Problem]:
    targets = Targets(groups_of(layout.quantization))
    ignore = list(layout.quantization.get("ignore") or [])
    several, unmatched = list[str](), list[str]()
    unread, plain, other = list[str](), list[str](), list[str]()
    for fused, parts in fused_parts(_linear_layers(layout)):
        if fused.rpartition(".")[2] not in LOOKED_UP:
            continue
        (saved, *more) = {_saved_group(layout, targets, part) for part in parts}
        ignored = _is_ignored(fused, parts if says else (), ignore)
        read = None if ignored else _group(targets, fused, parts if says else ())
        if more:
            several.append(fused)
        elif read is None and not ignored:
            unmatched.append(fused)
        elif read != saved:
            (plain if saved is None else unread if read is None else other).append(fused)
    for found, what, remedy in (
        (
            several,
            "fuses layers into one, which has one scheme; here they have several, or not all of "
            "them are quantized",
            "Give them one scheme, or put all of them into `ignore`.",
        ),
        (
            unmatched,
            "looks for layers that it fuses by their own names, which no target matches",
            "Name them beside their parts in `config.json`.",
        ),
        (
            unread,
            "takes quantized layers for layers in 16 bits, by the name of the layer that it makes "
            "of them",
            "Name it in `targets`, and not in `ignore`.",
        ),
        (
            plain,
            "takes layers in 16 bits for quantized ones, by the name or class of the layer that it "
            "makes of them",
            "Name it beside them in `ignore` of `config.json`.",
        ),
        (
            other,
            "gives layers another scheme, by the name or class of the layer that it makes of them",
            "Name it beside them in `targets` of `config.json`.",
        ),
    ):
        if found:
            yield Problem(NAME, what, tuple(found), remedy)


def _linear_layers(layout: CheckpointLayout) -> Iterator[str]:
    """Yield the names of layers with a matrix, without experts, which are matched otherwise."""
    for tensor, x in layout.tensors.items():
        name, _, part = tensor.rpartition(".")
        is_matrix = part in ("weight", "weight_packed") and len(x.shape) == 2
        if is_matrix and not EXPERT.search(name):
            yield name


def _saved_group(layout: CheckpointLayout, targets: Targets, name: str) -> str | None:
    """:return: by which a layer was saved; None for 16 bits"""
    if f"{name}.weight_scale" not in layout.tensors:
        return None
    return targets.compressed_tensors(name, "Linear")


def _is_ignored(fused: str, parts: Sequence[str], ignore: Iterable[str]) -> bool:
    """
    :param parts: that the class names
    :param ignore: names, ends of names, and expressions
    """
    ignore = list(ignore)
    expressions = Names(ignore)
    names = [fused] if fused in ignore or not parts else parts
    return all(
        name in expressions or any(name.endswith(f".{entry}") for entry in ignore) for name in names
    )


def _group(targets: Targets, fused: str, parts: Sequence[str]) -> str | None:
    """
    :param parts: that the class names
    :return: the group whose scheme SGLang gives a layer; None if no target matches
    """
    found = targets.vllm(fused, "Linear")  # of a fused name the same rule
    if found is not None or not parts:
        return found
    own = [targets.vllm(part, "") for part in parts]
    return own[0] if None not in own else None
