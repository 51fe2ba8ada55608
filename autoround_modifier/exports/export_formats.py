"""What each format to which a checkpoint can be exported holds without a change of its integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoround_modifier.errors import ExportError, listed
from autoround_modifier.exports.awq import misread_names
from autoround_modifier.exports.integer_specs import IntegerSpec
from autoround_modifier.exports.layer_names import in_block
from autoround_modifier.gguf_schemes import GGUF

__all__ = [
    "AUTO",
    "FORMATS",
    "GGUF",
    "ExportFormat",
    "check_format",
    "check_scales",
    "find_format",
    "layer_problems",
    "problems_of",
    "refuse",
    "rounded",
]

BITS = (2, 3, 4, 8)
AUTO = "auto"


@dataclass(frozen=True)
class ExportFormat:
    """
    :ivar name: of the format
    :ivar bits: of integers that it holds
    :ivar zero_point_bits: of integers that it holds where they have zero points
    :ivar group_sizes: that it holds, of which -1 stands for one scale for each output channel; None
        for any
    :ivar group_multiple: of which group sizes must be
    :ivar multiples: of which numbers of output and input features must be
    :ivar mixed: whether layers may have different bits and group sizes
    :ivar blocks_only: whether loaders quantize no linear layers outside blocks
    :ivar outside_blocks: whether it holds embeddings and heads
    :ivar float16_scales: whether scales are stored in float16
    :ivar experts: whether it holds experts of a mixture
    """

    name: str
    bits: tuple[int, ...]
    zero_point_bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None = None
    group_multiple: int = 1
    multiples: tuple[int, int] = (32, 32)
    mixed: bool = True
    blocks_only: bool = False
    outside_blocks: bool = False
    float16_scales: bool = True
    experts: bool = False


def _gguf(
    name: str, bits: tuple[int, ...], zero_point_bits: tuple[int, ...], block: int
) -> ExportFormat:
    """:param block: input features that share a scale in the file"""
    return ExportFormat(
        f"{GGUF}{name}",
        bits,
        zero_point_bits,
        group_multiple=block,
        multiples=(1, block),
        outside_blocks=True,
        experts=True,
    )


FORMATS: dict[str, ExportFormat] = {
    found.name: found
    for found in (
        ExportFormat("gptq", BITS, BITS, blocks_only=True),
        ExportFormat("awq", (4,), (4,), mixed=False),
        ExportFormat("auto_round", BITS, BITS, blocks_only=True),
        ExportFormat("mlx", BITS, BITS, (32, 64, 128), outside_blocks=True, float16_scales=False),
        # `weight / scale` is -2 to 1, -8 to 7, -16 to 15 and -128 to 127
        _gguf("tq2_0", (2,), (), 256),
        _gguf("q2_0", (2,), (), 64),
        _gguf("q4_0", (2, 3, 4), (2, 3), 32),
        _gguf("q5_0", (2, 3, 4, 5), (2, 3, 4), 32),
        _gguf("q8_0", (2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 5, 6, 7), 32),
        # `weight / scale` less a minimum is 0 to 15 and 0 to 31; whether the minimum is exact in
        # float16 is up to the numbers
        _gguf("q4_1", (2, 3, 4), (2, 3, 4), 32),
        _gguf("q5_1", (2, 3, 4, 5), (2, 3, 4, 5), 32),
        # no integers
        _gguf("mxfp4", (), (), 32),
        _gguf("nvfp4", (), (), 64),
        # for each layer the smallest type that holds it
        _gguf(AUTO, (), (), 1),
    )
}


def find_format(name: str) -> ExportFormat:
    """
    :param name: of a format; ``-`` stands for ``_``
    :raises ExportError: if there is no such format
    """
    found = FORMATS.get(name.lower().replace("-", "_"))
    if found is None:
        raise ExportError(f"there is no format `{name}`; use one of {', '.join(FORMATS)}")
    return found


def check_format(
    chosen: ExportFormat, specs: Sequence[IntegerSpec], skipped: Sequence[str]
) -> None:
    """
    :param specs: of the quantized layers
    :param skipped: layers that are not quantized
    :raises ExportError: if the format cannot hold them; names the layers, the reason, and the
        formats that can
    """
    problems = problems_of(chosen, specs, skipped)
    if problems:
        refuse(chosen, problems, lambda other: not problems_of(other, specs, skipped))


def check_scales(chosen: ExportFormat, scales: Iterable[tuple[IntegerSpec, Tensor]]) -> None:
    """
    :param scales: of each quantized layer, (out_features, groups): `IntegerCheckpoint.scale`
    :raises ExportError: if the format would round one; names the layers
    """
    specs: list[IntegerSpec] = []
    problems: dict[str, list[str]] = {}
    rounding: set[str] = set()  # formats that round one
    for spec, scale in scales:
        specs.append(spec)
        rounding |= {x.name for x in FORMATS.values() if rounded(x, spec, scale) is not None}
        reason = rounded(chosen, spec, scale)
        if reason is not None:
            problems.setdefault(reason, []).append(spec.name)
    if problems:
        refuse(
            chosen,
            problems,
            lambda other: other.name not in rounding and not problems_of(other, specs, []),
        )


def refuse(
    chosen: ExportFormat,
    problems: Mapping[str, list[str]],
    holds: Callable[[ExportFormat], bool],
) -> None:
    """:raises ExportError: always"""
    would_do = [name for name, other in FORMATS.items() if other != chosen and holds(other)]
    reasons = [f"{reason}: {listed(names)}" for reason, names in problems.items()]
    advice = (
        f"it can be exported to {', '.join(would_do)}"
        if would_do
        else "no other format is known to hold it; keep it in compressed-tensors"
    )
    raise ExportError(
        f"`{chosen.name}` cannot hold this checkpoint; {advice}.\n  " + "\n  ".join(reasons)
    )


def problems_of(
    chosen: ExportFormat, specs: Sequence[IntegerSpec], skipped: Sequence[str]
) -> dict[str, list[str]]:
    """:return: reason -> layers"""
    found: dict[str, list[str]] = {}
    for spec in specs:
        for reason in layer_problems(chosen, spec):
            found.setdefault(reason, []).append(spec.name)
    if not chosen.mixed:
        by_scheme: dict[int, list[str]] = {}
        for spec in specs:
            by_scheme.setdefault(spec.group_size, []).append(spec.name)
        if len(by_scheme) > 1:
            rare = min(by_scheme.values(), key=len)
            found["other group sizes than in other layers"] = rare
    if chosen.name == "awq":
        misread = misread_names([spec.name for spec in specs], skipped)
        if misread:
            found["would be skipped: their names contain that of a layer not quantized"] = misread
    return found


def layer_problems(chosen: ExportFormat, spec: IntegerSpec) -> Iterator[str]:
    """Yield why the format cannot hold the layer, whatever its numbers are."""
    if chosen.name == f"{GGUF}{AUTO}":
        others = [x for x in FORMATS.values() if x.name.startswith(GGUF) and x != chosen]
        if all(any(layer_problems(other, spec)) for other in others):
            yield f"{spec.label}: no type holds it"
        return
    if spec.kind == "expert" and not chosen.experts:
        yield "experts of a mixture are exported to GGUF alone"
    elif spec.kind in ("embedding", "head") and not chosen.outside_blocks:
        yield f"quantized {spec.kind}, where the format has none"
    elif chosen.blocks_only and in_block(spec.name) is None:
        yield "quantized outside the blocks, where its loaders quantize nothing"
    if spec.num_bits not in chosen.bits:
        held = f"{_numbers(chosen.bits)} bits" if chosen.bits else "no integers"
        yield f"{spec.label}: it holds {held}"
    elif not spec.symmetric and spec.num_bits not in chosen.zero_point_bits:
        bits = chosen.zero_point_bits
        zero_points = f"zero points with {_numbers(bits)} bits" if bits else "no zero points"
        yield f"{spec.label}: it holds {zero_points}"
    if chosen.group_sizes is not None and spec.group_size not in chosen.group_sizes:
        yield f"{spec.label}: it holds groups of {_numbers(chosen.group_sizes)}"
    if spec.group_size % chosen.group_multiple and spec.group_size != -1:
        yield f"{spec.label}: it holds groups of multiples of {chosen.group_multiple}"
    size, multiples = (spec.out_features, spec.in_features), chosen.multiples
    if size[0] % multiples[0] or size[1] % multiples[1]:
        yield (
            f"{size[0]} x {size[1]} features, which must be multiples of {multiples[0]} and "
            f"{multiples[1]}"
        )
    if spec.in_features % spec.features_per_scale:
        yield f"{spec.in_features} input features are no multiple of the group size"


def rounded(chosen: ExportFormat, spec: IntegerSpec, scale: Tensor) -> str | None:
    """:return: why scales, or what is computed from them, would be rounded; None if not"""
    exact = scale.double()
    if chosen.float16_scales and not torch.equal(scale.to(torch.float16).double(), exact):
        return "scales that are not exact in float16"
    if chosen.name == "mlx":
        if spec.symmetric:
            bias = exact * 2 ** (spec.num_bits - 1)
            if not torch.equal(bias.to(scale.dtype).double(), bias):
                return f"biases that are not exact in {scale.dtype}"
        elif bool((scale.float().contiguous().view(torch.int32) & (2**spec.num_bits - 1)).any()):
            return "biases that are not exact in float32"
    return None


def _numbers(numbers: Sequence[int]) -> str:
    return (
        ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
    )
