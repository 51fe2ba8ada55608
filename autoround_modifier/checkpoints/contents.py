"""What is in a checkpoint: its layers by kind, their schemes and their size. No weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks, find_blocks_file
from autoround_modifier.checkpoints.mtp import mtp_names, promised_mtp_layers
from autoround_modifier.checkpoints.saved_config import (
    COMPRESSED_TENSORS,
    quantization_of,
    text_part,
)
from autoround_modifier.checkpoints.saved_files import CONFIG, read_json, read_layout, tensor_files
from autoround_modifier.checkpoints.saved_layers import SavedLayer, saved_layers, tensor_bytes
from autoround_modifier.engines.layers import ShapedLayer
from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.engines.matching import groups_of
from autoround_modifier.engines.name_expressions import NUMBER
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.errors import CheckpointError
from autoround_modifier.gguf_schemes import GGUF_TYPES
from autoround_modifier.host.saving import RECIPE

__all__ = ["CheckpointContents", "LayerKind", "checkpoint_contents", "refuse_other_formats"]

SMALL = ("norms", "biases", "key-value cache scales", "others")


@dataclass(frozen=True)
class LayerKind:
    """
    Layers of one kind that are saved in one way.

    :param kind: last part of their names, such as ``q_proj``; ``experts``, ``embeddings``,
        ``lm_head``, ``norms``, ``biases``, ``key-value cache scales`` and ``others``
    :param scheme: label of their scheme; the dtype where they are not quantized
    :param layers: their number
    :param weights: numbers in them, before packing
    :param bits_per_weight: as saved, scales and zero points included
    :param bytes: of all their tensors
    :param quantized: whether they are
    """

    kind: str
    scheme: str
    layers: int
    weights: int
    bits_per_weight: float
    bytes: int
    quantized: bool


@dataclass(frozen=True)
class CheckpointContents:
    """
    :param folder: of the checkpoint
    :param architecture: class of the model, as its config names it
    :param format: ``compressed-tensors: <format>``, ``not quantized``, or which types of GGUF its
        layers were tuned in
    :param schemes: of the layers, and whether they are those of experts of a mixture
    :param single_group: whether it has one config group, that targets ``Linear``
    :param kinds: of layers, in the order of the files
    :param unquantized: linear layers and embeddings that are not quantized, with ``*`` for the
        numbers in their names -> how many there are
    :param weights: in the whole model, without scales
    :param bits_per_weight: of the whole model
    :param quantized_weights: those of quantized layers
    :param quantized_bits: for each of them, as saved; None if there are none
    :param bytes: of all tensors
    :param file_bytes: of all files in the folder
    :param files: number of safetensors files
    :param kv_cache: scheme of the key-value cache, in words; None if it is not quantized
    :param kv_cache_bits: of a number in it; None if it is not quantized
    :param mtp_layers: for multi-token prediction that ``config.json`` says there are
    :param mtp_tensors: those of them in the files
    :param recipe: text of ``recipe.yaml``; None if there is none
    :param notes: what is odd
    :param gguf_types: type of GGUF -> number of layers whose blocks are beside the weights
    :param gguf_layers: these layers, with the scheme of GGUF that they were tuned in
    :param layers: those that are quantized, each with its scheme and shape
    :param unquantized_layers: names of linear layers that are not quantized
    """

    folder: str
    architecture: str | None
    format: str
    schemes: tuple[tuple[Scheme, bool], ...]
    single_group: bool
    kinds: tuple[LayerKind, ...]
    unquantized: dict[str, int]
    weights: int
    bits_per_weight: float
    quantized_weights: int
    quantized_bits: float | None
    bytes: int
    file_bytes: int
    files: int
    kv_cache: str | None
    kv_cache_bits: int | None
    mtp_layers: int
    mtp_tensors: int
    recipe: str | None
    notes: tuple[str, ...] = ()
    gguf_types: dict[str, int] = field(default_factory=dict)
    gguf_layers: tuple[ShapedLayer, ...] = field(default=(), repr=False)
    layers: tuple[ShapedLayer, ...] = field(default=(), repr=False)
    unquantized_layers: tuple[str, ...] = field(default=(), repr=False)

    @property
    def is_quantized(self) -> bool:
        return self.quantized_weights > 0


def checkpoint_contents(folder: Path, layout: CheckpointLayout | None = None) -> CheckpointContents:
    """
    :param folder: of a checkpoint in safetensors files, not quantized or in any format of
        compressed-tensors
    :param layout: of its tensors; None reads it
    :raises CheckpointError: if it is none, or a file cannot be read
    """
    refuse_other_formats(folder)
    layout = read_layout(folder) if layout is None else layout
    quantization = quantization_of(layout.config) or {}
    notes = list(_odd(layout.config, quantization))
    layers = list(saved_layers(folder, layout, quantization, notes))
    quantized = [layer for layer in layers if layer.scheme is not None]
    weights = sum(layer.weights for layer in layers)
    size = sum(tensor_bytes(tensor) for tensor in layout.tensors.values())
    quantized_weights = sum(layer.weights for layer in quantized)
    groups = groups_of(quantization)
    experts = {(x.scheme, x.kind == "experts") for x in quantized if x.scheme is not None}
    promised = promised_mtp_layers(layout.config)
    mtp = mtp_names(layout.tensors, _num_layers(layout.config), promised > 0)
    recipe = folder / RECIPE
    names = layout.config.get("architectures") or [None]
    blocks = None if find_blocks_file(folder) is None else SavedBlocks(folder)
    if blocks is not None:
        notes.append(
            "the weights beside the blocks are the same ones, dequantized: engines load them in 16 "
            f"bits, and `export {folder} {blocks.scheme} FILE.gguf` writes a file for llama.cpp"
        )
    return CheckpointContents(
        folder=str(folder),
        architecture=names[0],
        format=_format(quantization, blocks),
        schemes=tuple(sorted(experts, key=lambda item: (item[0].label, item[1]))),
        single_group=len(groups) == 1 and "Linear" in next(iter(groups.values())),
        kinds=tuple(_kinds(layers)),
        unquantized=dict(
            Counter(NUMBER.sub("*", x.name) for x in layers if x.scheme is None and x.is_matrix)
        ),
        weights=weights,
        bits_per_weight=8 * size / weights if weights else 0.0,
        quantized_weights=quantized_weights,
        quantized_bits=(
            8 * sum(layer.bytes for layer in quantized) / quantized_weights
            if quantized_weights
            else None
        ),
        bytes=size,
        file_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        files=len(set(tensor_files(folder).values())),
        kv_cache=_kv_cache(quantization.get("kv_cache_scheme")),
        kv_cache_bits=(quantization.get("kv_cache_scheme") or {}).get("num_bits"),
        mtp_layers=promised,
        mtp_tensors=len(mtp),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
        notes=tuple(dict.fromkeys(notes)),
        gguf_types={} if blocks is None else dict(Counter(blocks.types.values())),
        gguf_layers=() if blocks is None else tuple(_gguf_layers(layers, blocks)),
        layers=tuple(
            ShapedLayer(x.name, x.scheme, x.shape[-2], x.shape[-1], x.kind == "experts")
            for x in quantized
            if x.scheme is not None and len(x.shape) > 1
        ),
        unquantized_layers=tuple(
            x.name
            for x in layers
            if x.scheme is None and x.is_matrix and x.shape and x.kind != "embeddings"
        ),
    )


def refuse_other_formats(folder: Path) -> None:
    """
    :raises CheckpointError: if it is no folder of a checkpoint, or a checkpoint that is quantized
        in a format other than those of compressed-tensors; names the format
    """
    takes = (
        "compressed-tensors checkpoints and unquantized ones are read here. Of an exported "
        "checkpoint, name the one that it was made of"
    )
    if folder.suffix == ".gguf":
        raise CheckpointError(f"{folder} is in the format gguf; {takes}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; {takes}")
    if not (folder / CONFIG).is_file():
        if any(folder.glob("*.gguf")):
            raise CheckpointError(f"{folder} is in the format gguf; {takes}")
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    found = quantization_of(config)
    if found is not None:
        method = found.get("quant_method") or found.get("quant_algo")
        if method is None:
            method = "mlx" if config.get("quantization") else "of an unknown name"
        if method != COMPRESSED_TENSORS:
            raise CheckpointError(f"{folder} is quantized in the format {method}; {takes}")
    for file, method in (("quantize_config.json", "gptq"), ("hf_quant_config.json", "modelopt")):
        if found is None and (folder / file).is_file():
            raise CheckpointError(f"{folder} is quantized in the format {method}; {takes}")


def _odd(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is unusual in a config."""
    if quantization and "quantization_config" not in config:
        yield (
            "the quantization is not in `quantization_config` of config.json but in "
            + ("`compression_config`" if "compression_config" in config else "its part about text")
            + ", which is not checked for vLLM"
        )
    sparsity = (quantization.get("sparsity_config") or {}).get("format")
    if sparsity in (None, "dense") and "24" in str(quantization.get("format")):
        sparsity = quantization["format"]
    if sparsity not in (None, "dense"):
        yield f"weights are stored sparsely as well ({sparsity}), so that some are not counted"


def _gguf_layers(layers: Iterable[SavedLayer], blocks: SavedBlocks) -> Iterator[ShapedLayer]:
    for layer in layers:
        if layer.name in blocks.types:
            scheme = Scheme(
                "gguf", GGUF_TYPES[blocks.types[layer.name]].num_bits, format=blocks.scheme
            )
            experts = layer.kind == "experts"
            yield ShapedLayer(layer.name, scheme, layer.shape[-2], layer.shape[-1], experts)


def _format(quantization: Mapping[str, Any], blocks: SavedBlocks | None) -> str:
    if blocks is not None:
        counts = Counter(blocks.types.values())
        types = ", ".join(f"{kind.upper()} ({count})" for kind, count in counts.most_common())
        return f"{blocks.scheme}: blocks of GGUF of {len(blocks.types)} layers, {types}"
    return f"{COMPRESSED_TENSORS}: {_formats(quantization)}" if quantization else "not quantized"


def _formats(quantization: Mapping[str, Any]) -> str:
    groups = (quantization.get("config_groups") or {}).values()
    formats = dict.fromkeys(x["format"] for x in groups if x.get("format"))
    return ", ".join(formats) or str(quantization.get("format") or "unknown format")


def _num_layers(config: Mapping[str, Any]) -> int | None:
    return text_part(config).get("num_hidden_layers")


def _kv_cache(scheme: Mapping[str, Any] | None) -> str | None:
    if not scheme:
        return None
    kind = "FP8" if scheme.get("type") == "float" else f"{scheme.get('num_bits')}-bit integers"
    strategy = {"tensor": "one scale for keys and one for values of each layer"}.get(
        str(scheme.get("strategy")), f"scales by {scheme.get('strategy')}"
    )
    return f"{kind}, {strategy}, {'dynamic' if scheme.get('dynamic') else 'calibrated'}"


def _kinds(layers: list[SavedLayer]) -> Iterator[LayerKind]:
    grouped: dict[tuple[str, str], list[SavedLayer]] = {}
    for layer in layers:
        grouped.setdefault((layer.kind, layer.label), []).append(layer)
    for (kind, label), found in sorted(grouped.items(), key=lambda item: item[0][0] in SMALL):
        weights, size = (sum(getattr(x, field) for x in found) for field in ("weights", "bytes"))
        yield LayerKind(
            kind,
            label,
            len(found),
            weights,
            8 * size / weights if weights else 0.0,
            size,
            found[0].scheme is not None,
        )
