"""Names of layers in the configs of other formats: expressions, blocks, and the general scheme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from autoround_modifier.engines.fused import fused_parts
from autoround_modifier.exports.integer_specs import EXPERTS, IntegerSpec

__all__ = [
    "block_lists",
    "expressions",
    "in_block",
    "is_experts",
    "most_common_scheme",
    "names_in_each_block",
    "with_fused",
]

# Module list, number of the block, and name inside the block
_BLOCK = re.compile(r"(.*?[^.\d][^.]*)\.(\d+)\.(.+)")


def in_block(name: str) -> tuple[str, int, str] | None:
    """:return: name of the module list, number of the block, name inside it; None outside blocks"""
    found = _BLOCK.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), found[3])


def block_lists(names: Iterable[str]) -> list[str]:
    """:return: the module lists that hold the layers, such as ``model.layers``"""
    found = (in_block(name) for name in names)
    return list(dict.fromkeys(parts[0] for parts in found if parts is not None))


def names_in_each_block(names: Sequence[str], others: Sequence[str] = ()) -> list[str] | None:
    """
    :param names: of layers
    :param others: of layers in the same or other blocks; a block with none but these counts
    :return: names inside a block; None if they are not the same in all blocks
    """
    blocks: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parts = in_block(name)
        if parts is None:
            return None
        blocks.setdefault(parts[:2], []).append(parts[2])
    lists = {prefix for prefix, _ in blocks}
    for name in others:
        parts = in_block(name)
        if parts is not None and parts[0] in lists:
            blocks.setdefault(parts[:2], [])
    first, *rest = blocks.values()
    return first if all(set(block) == set(first) for block in rest) else None


def most_common_scheme(specs: Sequence[IntegerSpec]) -> tuple[int, int]:
    """:return: bits and group size of most layers"""
    return Counter((spec.num_bits, spec.group_size) for spec in specs).most_common(1)[0][0]


def with_fused(names: Sequence[str]) -> list[str]:
    """:return: names, and those of the layers into which vLLM fuses them"""
    return [*names, *(fused for fused, _ in fused_parts(names))]


def expressions(names: Iterable[str], others: Collection[str] = ()) -> list[str]:
    """
    Engines may know a model under another prefix than the files, so that expressions match names
    from the list of blocks on, if they match none of the others then.

    :param names: of layers, and of modules that hold experts
    :param others: names that must not match
    :return: expressions that match these names, and what is in modules of experts, by `re.match`,
        `re.search` and `re.fullmatch` alike; few where layers have the same names in many blocks
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    result = []
    for name in names:
        parts = in_block(name)
        if parts is None:
            result.append(f"^{_with_experts(name)}$")
        else:
            numbers.setdefault((parts[0], parts[2]), []).append(parts[1])
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (prefix, inside), found in numbers.items():
        alike.setdefault((prefix, tuple(sorted(found))), []).append(inside)
    for (prefix, found_numbers), inner in alike.items():
        blocks = "|".join(map(str, found_numbers))
        inside_blocks = "|".join(map(_with_experts, inner))
        rest = rf"\.(?:{blocks})\.(?:{inside_blocks})$"
        anywhere = rf"^(?:.*\.)?{re.escape(prefix.rpartition('.')[2])}{rest}"
        is_own = not any(map(re.compile(anywhere).match, others))
        result.append(anywhere if is_own else rf"^{re.escape(prefix)}{rest}")
    return result


def _with_experts(name: str) -> str:
    """:return: expression for the name; of a module of experts, also for what is in it"""
    return re.escape(name) + (r"(?:\..+)?" if is_experts(name) else "")


def is_experts(name: str) -> bool:
    """:return: whether it is the name of a module that holds the experts of a mixture"""
    return name.rpartition(".")[2] == EXPERTS
