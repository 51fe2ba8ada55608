"""Layers for multi-token prediction: found in the source, kept, quantized if a target says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoround_modifier.activations import needs_calibration
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.checkpoints.mtp import (
    MTP_FIELDS,
    mtp_expressions,
    mtp_names,
    promised_mtp_layers,
    renumbered,
    with_mtp_layers,
)
from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.checkpoints.saved_files import CONFIG, add_to_index, read_json, write_json
from autoround_modifier.checkpoints.source import SourceCheckpoint, find_source
from autoround_modifier.errors import CheckpointError, SchemeError
from autoround_modifier.host.layers import Layer, disable_onloading
from autoround_modifier.host.lifecycle import Modifier
from autoround_modifier.host.matching import is_match
from autoround_modifier.host.saving import compressed_tensors_of, prepare_compression
from autoround_modifier.host.schemes import (
    QuantizationArgs,
    QuantizationScheme,
    unsupported_weights,
    weight_spec,
)
from autoround_modifier.host.write_back import write_back
from autoround_modifier.modifiers.settings import SchemeSettings
from autoround_modifier.search.initial_weights import InitialWeights

__all__ = ["MtpLayers", "find_mtp_layers", "save_mtp_layers"]

# LLM-Compressor's name for them; then model_mtp_2.safetensors and so on
FILE = "model_mtp.safetensors"
MAX_FILE_BYTES = 5 * 2**30
MIXED_FORMAT = "mixed-precision"
# Tables of the vocabulary, which a model with another vocabulary cannot use
VOCABULARY = ("embed_tokens", "shared_head.head", "lm_head")


@dataclass(frozen=True)
class MtpLayers:
    """
    :ivar source: the checkpoint that has them; None if there are none, or they are dropped
    :ivar names: of their tensors, in the source -> in the saved model
    :ivar schemes: of layers that a target names: name in the saved model -> scheme
    """

    source: SourceCheckpoint | None = None
    names: dict[str, str] = field(default_factory=dict)
    schemes: dict[str, QuantizationScheme] = field(default_factory=dict)


def find_mtp_layers(model: PreTrainedModel, modifiers: Iterable[Modifier]) -> MtpLayers:
    """
    :param model: as it was loaded
    :param modifiers: of the recipe. One with ``mtp: drop`` drops the layers. A target that matches
        names of these layers, and of no layer of the model, quantizes them, but not to GGUF
    :raises SchemeError: if their scheme does not fit, or needs calibration
    """
    modifiers = list(modifiers)
    if any(getattr(modifier, "mtp", "keep") == "drop" for modifier in modifiers):
        return MtpLayers()
    config = model.config
    origin, own = config._name_or_path, config.to_dict()
    source = find_source(origin, getattr(config, "_commit_hash", None))
    promised = promised_mtp_layers(own)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if source is None:
        if promised or (origin and any("mtp" in one for one in ignored)):
            logger.warning(
                "if this model is released with layers for multi-token prediction, they will be "
                f"missing: its files ({origin or 'it names none'}) are not on this machine. The "
                "saved config will promise none"
            )
        return MtpLayers()
    own_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    num_layers = text_part(source.config).get("num_hidden_layers", own_layers)
    with disable_onloading():
        known = {name for name, _ in model.named_parameters()}
    found = mtp_names(
        [name for name in source.files if not source.is_scale(name) and name not in known],
        num_layers,
        bool(promised or promised_mtp_layers(source.config)),
        ignored,
    )
    if found and _vocabulary_changed(source, own) and any(map(_is_vocabulary, found)):
        logger.warning(
            "the layers for multi-token prediction have the vocabulary of the source, which is "
            "not the model's: they will be missing, and the saved config will say so"
        )
        return MtpLayers()
    if not found:
        if promised:
            logger.info(
                f"the config promises {promised} layers for multi-token prediction, which the "
                "source does not have: the saved config will say so"
            )
        return MtpLayers()
    names = {name: renumbered(name, num_layers, own_layers) for name in found}
    schemes = _targeted(model, modifiers, source, names)
    logger.info(
        f"{len(names)} tensors of layers for multi-token prediction are kept"
        + (f", {len(schemes)} of their layers quantized" if schemes else "")
    )
    return MtpLayers(source, names, schemes)


def _vocabulary_changed(source: SourceCheckpoint, own: Mapping[str, Any]) -> bool:
    size = text_part(source.config).get("vocab_size")
    return size is not None and size != text_part(own).get("vocab_size")


def _is_vocabulary(name: str) -> bool:
    return any(part in name for part in VOCABULARY)


def _linear_layers(source: SourceCheckpoint, names: Mapping[str, str]) -> dict[str, str]:
    """:return: of the linear layers: name in the saved model -> name of the weight in the source"""
    return {
        saved.removesuffix(".weight"): name
        for name, saved in names.items()
        if name.endswith(".weight") and "embed" not in name and len(source.shape(name)) == 2
    }


def _targeted(
    model: nn.Module,
    modifiers: Sequence[Modifier],
    source: SourceCheckpoint,
    names: Mapping[str, str],
) -> dict[str, QuantizationScheme]:
    linear, like = _linear_layers(source, names), nn.Linear(1, 1, device="meta")
    own = [(name, x) for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    schemes: dict[str, QuantizationScheme] = {}
    for modifier in modifiers:
        if not isinstance(modifier, SchemeSettings) or not modifier.has_schemes:
            continue
        if modifier.gguf_scheme is not None:  # its schemes are carriers, in which nothing is saved
            continue
        for scheme in modifier.resolved_config.config_groups.values():
            targets = [
                target
                for target in scheme.targets
                if any(is_match(layer, like, target) for layer in linear)
                and not any(is_match(name, x, target) for name, x in own)
            ]
            for layer, name in linear.items():
                if targets and is_match(layer, like, targets, modifier.ignore):
                    chosen = scheme.model_copy(update={"targets": targets}, deep=True)
                    _check_scheme(layer, source.shape(name), chosen)
                    schemes.setdefault(layer, chosen)
    return schemes


def _check_scheme(layer: str, shape: Sequence[int], scheme: QuantizationScheme) -> None:
    reason = unsupported_weights(scheme.weights)
    if reason is None and needs_calibration(scheme.input_activations):
        reason = "layers for multi-token prediction do not run while calibrating; use dynamic ones"
    size = getattr(scheme.weights, "group_size", None)
    if reason is None and size and size > 0 and shape[1] % size:
        reason = f"group_size {size} does not divide its {shape[1]} input features"
    if reason is not None:
        raise SchemeError(f"{layer}: {reason}")


# ---------------------------------------------------------------------- saving


def save_mtp_layers(model: PreTrainedModel, folder: Path, layers: MtpLayers) -> None:
    """
    Write the layers beside the model, and let ``config.json`` say what is there.

    :param model: that was saved
    :param folder: with its files
    :param layers: `find_mtp_layers`
    :raises CheckpointError: if a file of the model cannot be read. Where one of the source can no
        longer be read, the layers are missing, with an error in the log
    """
    config = read_json(folder / CONFIG)
    try:
        _write(folder, layers, model.dtype)
    except CheckpointError as error:
        logger.error(f"layers for multi-token prediction are missing in what was saved: {error}")
        layers = MtpLayers()
    if layers.source is None:
        write_json(folder / CONFIG, _promising_none(config, model.config.to_dict()))
        return
    quantization = config.get("quantization_config")
    if quantization:
        _describe(quantization, layers)
        write_json(folder / CONFIG, config)


def _promising_none(config: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """:return: ``config.json`` with no layers for MTP, where it or the class's default has some"""
    result = with_mtp_layers(config, 0)
    for fields in (own, own.get("text_config") or {}):
        part = result if fields is own else result.get("text_config", {})
        part.update({name: 0 for name in MTP_FIELDS if fields.get(name)})
    return result


def _write(folder: Path, layers: MtpLayers, dtype: torch.dtype) -> None:
    """
    Write the tensors to files of limited size, as they come.

    :raises CheckpointError: if the source cannot be read; nothing is written then
    """
    files, waiting = dict[str, list[str]](), dict[str, Tensor]()

    def flush() -> None:
        number = len(files) + 1
        name = FILE if number == 1 else f"{Path(FILE).stem}_{number}.safetensors"
        files[name] = list(waiting)
        save_file(waiting, folder / name, metadata={"format": "pt"})
        waiting.clear()

    if layers.source is None:
        return
    try:
        for name, tensor in _saved_tensors(layers.source, layers, dtype):
            waiting[name] = tensor.contiguous()
            if sum(one.nbytes for one in waiting.values()) >= MAX_FILE_BYTES:
                flush()
    except CheckpointError:
        for file in files:
            (folder / file).unlink()
        raise
    if waiting:
        flush()
    for file, names in files.items():
        add_to_index(folder, file, names)


def _saved_tensors(
    source: SourceCheckpoint, layers: MtpLayers, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under their saved names; those of quantized layers are compressed."""
    together: dict[str, dict[str, str]] = {}  # by parent, because engines fuse some of them
    for name, saved in layers.names.items():
        layer = saved.removesuffix(".weight")
        if layer in layers.schemes and layer != saved:
            parent, _, child = layer.rpartition(".")
            together.setdefault(parent, {})[child] = name
        else:
            yield saved, source.tensor(name, dtype)
    for parent, children in together.items():
        weights = {child: source.tensor(name, dtype) for child, name in children.items()}
        schemes = {child: layers.schemes[f"{parent}.{child}"] for child in weights}
        for part, tensor in _quantized(weights, schemes, dtype).items():
            yield f"{parent}.{part}", tensor


@torch.no_grad()
def _quantized(
    weights: Mapping[str, Tensor], schemes: Mapping[str, QuantizationScheme], dtype: torch.dtype
) -> dict[str, Tensor]:
    """:return: the compressed tensors of layers of one parent, by the scale search alone"""
    parent, layers = nn.Module(), dict[Layer, str]()
    for name, weight in weights.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype, device="meta")
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        parent.add_module(name, layer)
        prepare_compression(layer, schemes[name])
        layers[layer] = name
    args = {layer: cast(QuantizationArgs, schemes[name].weights) for layer, name in layers.items()}
    specs = {layer: weight_spec(weights) for layer, weights in args.items()}
    initial = InitialWeights(layers, specs, Importance())
    initial.find_shared_scales(parent, layers, search=True)
    found: dict[str, Tensor] = {}
    for child, name in layers.items():
        quantized = initial.start(child, search=True).quantized()
        write_back(child, quantized, args[child])
        found |= {f"{name}.{key}": value for key, value in compressed_tensors_of(child).items()}
    return found


def _describe(quantization: dict[str, Any], layers: MtpLayers) -> None:
    """
    :param quantization: `quantization_config`, updated: its ``ignore`` gets the layers that are
        kept, its groups those that are quantized
    """
    assert layers.source is not None
    if layers.schemes:
        linear = _linear_layers(layers.source, layers.names)
        kept = [name for name in linear if name not in layers.schemes]
    else:
        kept = mtp_expressions(layers.names.values())
    quantization["ignore"] = list(dict.fromkeys([*(quantization.get("ignore") or []), *kept]))
    groups = quantization["config_groups"]
    for scheme in layers.schemes.values():
        dumped = scheme.model_dump(mode="json")
        if dumped not in groups.values():
            groups[f"mtp_{len(groups)}"] = dumped
            if quantization.get("format") != dumped["format"]:
                quantization["format"] = MIXED_FORMAT
