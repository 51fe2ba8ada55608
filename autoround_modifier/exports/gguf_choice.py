"""Which type of GGUF each layer of a checkpoint gets: one that holds its numbers as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from autoround_modifier.errors import listed
from autoround_modifier.exports.export_formats import (
    AUTO,
    FORMATS,
    GGUF,
    ExportFormat,
    layer_problems,
    problems_of,
    refuse,
    rounded,
)
from autoround_modifier.exports.float_layers import FloatSpec, WeightCheckpoint
from autoround_modifier.exports.gguf_blocks import HAS_MINIMUM, inexact_minima
from autoround_modifier.exports.gguf_names import stacked
from autoround_modifier.exports.gguf_types import BLOCK_TYPES, BlockType
from autoround_modifier.readable import percent_text

__all__ = ["TYPES", "Choice", "choose_types"]

# From the smallest on
TYPES = tuple(
    sorted(
        (kind for name, kind in BLOCK_TYPES.items() if f"{GGUF}{name}" in FORMATS),
        key=lambda kind: kind.bits,
    )
)
SIGN_BIT = 0x80
MINIMA = "minima, scale times zero point, that are not exact in float16"


@dataclass(frozen=True)
class Choice:
    """
    :ivar kinds: name of a layer -> its type
    :ivar notes: what a user should know of it
    """

    kinds: dict[str, BlockType]
    notes: tuple[str, ...]


def choose_types(checkpoint: WeightCheckpoint, name: str) -> Choice:
    """
    Layers get the named type. Those that it does not hold get the smallest type that does; experts
    that are one tensor in GGUF get the same.

    :param checkpoint: whose layers are written
    :param name: of a type, or ``auto`` for the smallest type for each layer
    :raises ExportError: if the named type holds no layer, or no type holds one of them; names the
        layers, the reasons, and the formats that hold them
    """
    wanted = None if name == AUTO else BLOCK_TYPES[name]
    first = () if wanted is None else (wanted,)
    order = (*first, *(kind for kind in TYPES if kind != wanted))
    kinds: dict[str, BlockType] = {}
    without: list[str] = []
    for layers in stacked([*checkpoint.specs, *checkpoint.float_specs]).values():
        held = (kind for kind in order if not any(_all_problems(checkpoint, layers, kind)))
        kind = next(held, None)
        if kind is None:
            without += layers
        else:
            kinds |= dict.fromkeys(layers, kind)
    if without or (wanted is not None and wanted not in kinds.values()):
        _refuse(checkpoint, name, without or list(kinds))
    return Choice(kinds, tuple(_notes(kinds, wanted)))


def _all_problems(
    checkpoint: WeightCheckpoint, layers: Sequence[str], kind: BlockType
) -> Iterator[str]:
    for layer in layers:
        yield from _problems(checkpoint, layer, kind)


def _problems(checkpoint: WeightCheckpoint, name: str, kind: BlockType) -> Iterator[str]:
    """Yield why the type does not hold a layer as it is. Numbers are read where they matter."""
    found = checkpoint.float_specs.get(name)
    if found is not None:
        yield from _float_problems(checkpoint, found, kind)
        return
    spec, chosen = checkpoint.specs[name], FORMATS[f"{GGUF}{kind.name}"]
    reasons = list(layer_problems(chosen, spec))
    if not reasons:
        reason = rounded(chosen, spec, checkpoint.scale(name))
        reasons = [] if reason is None else [reason]
    if not reasons and kind in HAS_MINIMUM:
        reasons = [MINIMA] if inexact_minima(checkpoint.layer(name)) else []
    yield from reasons


def _float_problems(
    checkpoint: WeightCheckpoint, spec: FloatSpec, kind: BlockType
) -> Iterator[str]:
    if kind.name != spec.numbers:
        yield f"{spec.label}: {GGUF}{spec.numbers} alone holds it"
    elif spec.in_features % kind.block:
        yield f"{spec.in_features} input features, which must be a multiple of {kind.block}"
    elif kind.name == "nvfp4" and bool((checkpoint.float_layer(spec.name).scale & SIGN_BIT).any()):
        yield f"{spec.label}: a scale is negative"


def _refuse(checkpoint: WeightCheckpoint, name: str, layers: Sequence[str]) -> None:
    """
    :param layers: that no type holds, or none of which the named type holds
    :raises ExportError: always
    """
    specs = list(checkpoint.specs.values())
    every = [*checkpoint.specs, *checkpoint.float_specs]

    def holds(other: ExportFormat) -> bool:
        kind = BLOCK_TYPES.get(other.name.removeprefix(GGUF))
        if kind is not None:
            return not any(_all_problems(checkpoint, every, kind))
        if checkpoint.float_specs or other.name == f"{GGUF}{AUTO}":
            return False
        return not problems_of(other, specs, checkpoint.unquantized_layers)

    kind = BLOCK_TYPES["q8_0" if name == AUTO else name]
    problems: dict[str, list[str]] = {}
    for layer in layers:
        for reason in _problems(checkpoint, layer, kind):
            problems.setdefault(reason, []).append(layer)
    inexact = problems.pop(MINIMA, [])
    if inexact:
        share = fmean(inexact_minima(checkpoint.layer(layer)) for layer in inexact)
        problems[f"{MINIMA}, in {percent_text(share)} of the groups"] = inexact
    refuse(FORMATS[f"{GGUF}{name}"], problems, holds)


def _notes(kinds: dict[str, BlockType], wanted: BlockType | None) -> Iterator[str]:
    counts = Counter(kinds.values())
    if wanted is None:
        used = ", ".join(f"{count} in {kind.name}" for kind, count in counts.most_common())
        yield f"layers: {used}"
        return
    for kind, count in counts.items():
        if kind != wanted:
            names = [name for name, found in kinds.items() if found == kind]
            yield (
                f"{wanted.name} does not hold {count} of {len(kinds)} layers as they are; they are "
                f"in {kind.name}: {listed(names)}"
            )
