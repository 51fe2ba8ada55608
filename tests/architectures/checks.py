"""What is checked of each architecture: traced, tuned, saved and reloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from catalogue import FUSED_EXPERTS, NO_WEIGHT, Architecture
from compressed_tensors.utils import is_match, match_named_modules
from conftest import tiny_tokenizer, weight_scheme
from helpers import integers, quantized_layers, saved_integers, saved_tensors
from llmcompressor.pipelines.sequential import pipeline
from llmcompressor.utils.pytorch import infer_sequential_targets
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoround_modifier import AutoRoundModifier, RecipeError, oneshot
from autoround_modifier.host.saved_names import saved_name
from autoround_modifier.tuning import Tuner

__all__ = ["Outcome", "check", "collate", "modifier", "run"]

# Linear layers that choose or weigh experts, in the architectures of the catalogue
ROUTER = re.compile(r".*\.(router|shared_expert_gate)(\..*)?")
NUM_BITS = 4


@dataclass
class Call:
    """One call of a function."""

    args: tuple[Any, ...]
    result: Any


@dataclass
class Outcome:
    """What is wrong, in words; empty where nothing is."""

    traced: str = ""
    tuned: str = ""
    saved: str = ""
    reloaded: str = ""


def check(architecture: Architecture, folder: Path) -> Outcome:
    """
    Quantize a model of this architecture, save it and load it again.

    :param folder: empty; for the model's checkpoints
    """
    model = architecture.build(folder / "original")
    data = architecture.samples()
    sample = collate([data[0]])
    original = logits(model, sample)
    targets = architecture.sequential_targets
    if architecture.limitation:  # refused before anything runs, unless vLLM alone is meant
        with pytest.raises(RecipeError, match=architecture.limitation):
            run(architecture, model, data, modifier(architecture, "any"))
    recipe = modifier(architecture, "none" if architecture.limitation else architecture.engine)
    with (
        spied(pipeline, "trace_subgraphs") as traces,
        spied(Tuner, "run") as tunings,
        warnings() as messages,
    ):
        run(architecture, model, data, recipe)
    named_blocks = match_named_modules(model, infer_sequential_targets(model, targets))
    blocks = {block: name for name, block in named_blocks}
    outcome = Outcome(
        traced=why_not_traced(model, blocks, traces),
        tuned=why_not_tuned(model, blocks, architecture.ignore, recipe, tunings, messages),
    )
    quantized = logits(model, sample)
    difference = distance(original, quantized)
    in_memory = {
        name: (integers(layer), layer.weight_scale.clone())
        for name, layer in quantized_layers(model).items()
    }
    model.save_pretrained(folder / "quantized", save_compressed=True)
    outcome.saved = why_not_saved(model, in_memory, saved_tensors(folder / "quantized"))

    def expected(loaded: PreTrainedModel) -> str:
        error = distance(logits(loaded, sample), quantized)
        return f"logits differ by {error:.2g}" if error > 0.05 * difference else ""

    outcome.reloaded = why_not_reloaded(architecture, folder / "quantized", expected)
    return outcome


def modifier(architecture: Architecture, engine: str) -> AutoRoundModifier:
    return AutoRoundModifier(
        iters=2,
        batch_size=2,
        min_expert_tokens=0,
        ignore=["re:.*lm_head", *architecture.ignore],
        config_groups={"group_0": weight_scheme(NUM_BITS)},
        engine=engine,
    )


def run(
    architecture: Architecture, model: PreTrainedModel, data: Any, recipe: AutoRoundModifier
) -> PreTrainedModel:
    targets = architecture.sequential_targets
    return oneshot(
        model=model,
        recipe=recipe,
        dataset=data,
        processor=tiny_tokenizer(),
        data_collator=collate,
        sequential_targets=None if targets is None else list(targets),
        pipeline=architecture.pipeline,
    )


def why_not_reloaded(
    architecture: Architecture, folder: Path, expected: Callable[[PreTrainedModel], str]
) -> str:
    """:param expected: says what is wrong with the logits of the loaded model"""
    model_class = getattr(transformers, architecture.model_class)
    try:
        loaded, info = model_class.from_pretrained(folder, output_loading_info=True)
    except AttributeError as error:
        if re.search("has no attribute .weight", str(error)):
            return NO_WEIGHT
        raise
    if any(".experts." in name for name in info["missing_keys"]):
        return FUSED_EXPERTS
    return expected(loaded)


def collate(batch: list[dict[str, Any]], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The data collator of LLM-Compressor's examples of vision-language models."""
    (sample,) = batch
    tensors = {name: torch.tensor(value) for name, value in sample.items()}
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def why_not_traced(model: nn.Module, blocks: dict[nn.Module, str], traces: list[Call]) -> str:
    per_subgraph = [
        [module for module in subgraph.submodules(model) if module in blocks]
        for trace in traces
        for subgraph in trace.result
    ]
    if any(len(found) > 1 for found in per_subgraph):
        return "several blocks in one subgraph"
    missing = set(blocks) - {block for found in per_subgraph for block in found}
    classes = sorted({type(block).__name__ for block in missing})
    return f"not traced: {', '.join(classes)}" if classes else ""


def why_not_tuned(
    model: nn.Module,
    blocks: dict[nn.Module, str],
    ignore: tuple[str, ...],
    recipe: AutoRoundModifier,
    tunings: list[Call],
    messages: list[str],
) -> str:
    expected = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and any(name.startswith(f"{block}.") for block in blocks.values())
        and not is_match(name, layer, list(ignore))
        and not ROUTER.fullmatch(name)
    }
    names = {module: name for name, module in model.named_modules()}
    tuned = {names[layer] for tuning in tunings for layer in tuning.args[0].formats}
    problems = [message for message in messages if "not tuned" in message]
    for word, found in (
        ("tuned", tuned),
        ("quantized", set(quantized_layers(model))),
    ):
        problems += [f"not {word}: {name}" for name in sorted(expected - found)]
        problems += [f"{word}: {name}" for name in sorted(found - expected)]
    reported = {name for report in recipe.block_reports for name in report.name.split(", ")}
    if reported != set(blocks.values()):
        problems.append(f"reports of {sorted(reported)}")
    return "; ".join(problems)


def why_not_saved(
    model: nn.Module, in_memory: dict[str, tuple[Tensor, Tensor]], tensors: dict[str, Tensor]
) -> str:
    problems, renamed = [], saved_name(model)
    for name, (values, scale) in in_memory.items():
        stem = renamed(f"{name}.weight_packed").removesuffix(".weight_packed")
        if f"{stem}.weight_packed" not in tensors:
            problems.append(f"no packed weight of {name}")
        elif not (
            torch.equal(saved_integers(tensors, stem, NUM_BITS), values)
            and torch.equal(tensors[f"{stem}.weight_scale"], scale)
        ):
            problems.append(f"other integers or scales of {name}")
    return "; ".join(problems)


@torch.no_grad()
def logits(model: PreTrainedModel, sample: dict[str, Tensor]) -> Tensor:
    return model(**sample).logits.float()


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm())


@contextmanager
def spied(module: Any, name: str) -> Iterator[list[Call]]:
    """Record the calls of a function, or of a method of a class."""
    original, calls = getattr(module, name), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(Call(args, original(*args, **kwargs)))
        return calls[-1].result

    with mock.patch.object(module, name, spy):
        yield calls


@contextmanager
def warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(messages.append, level="WARNING", format="{message}")
    try:
        yield messages
    finally:
        logger.remove(sink)
