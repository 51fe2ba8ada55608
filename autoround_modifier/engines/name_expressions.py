"""Expressions that match the names of some layers of a model, and not those of others."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["NUMBER", "block_of", "by_shape", "expression_for", "expressions_for", "shortest"]

SEPARATOR = r"\."
# A part of a name that is a number
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def expressions_for(own: list[str], others: list[str]) -> list[str]:
    """
    :param own: names to match
    :param others: names that must not match
    :return: targets: for all blocks or experts at once where that is possible, else by the number
        of the block, else the names
    """
    shapes, taken = by_shape(own), by_shape(others)
    stems: dict[str, list[str]] = {}
    numbered: dict[tuple[str, str], list[str]] = {}
    expressions: list[str] = []
    single: list[str] = []
    for shape, names in shapes.items():
        if shape not in taken:
            stem, _, leaf = shortest(shape, taken).rpartition(".")
            stems.setdefault(stem, []).append(leaf)
            continue
        blocks = {block_of(name) for name in names}
        if blocks & {block_of(name) for name in taken[shape]}:
            single += names
        else:
            end = shortest(shape, [x for x in taken if x != shape])
            numbers = "|".join(sorted(blocks, key=int))
            stem, _, leaf = end.rpartition(".")
            if "#" in stem:
                numbered.setdefault((stem, numbers), []).append(leaf)
            else:
                expressions.append(expression_for(end, numbers))
    shared = {x.rpartition(".")[0] for x in taken}
    joined = [
        expression_for(*_joined(stem, leaves, any(x.endswith(stem) for x in shared)))
        for stem, leaves in stems.items()
    ]
    joined += [
        expression_for(*_joined(stem, leaves, True, numbers))
        for (stem, numbers), leaves in numbered.items()
    ]
    return [*dict.fromkeys([*joined, *expressions]), *single]


def _joined(
    stem: str, leaves: list[str], shared: bool, blocks: str | None = None
) -> tuple[str, str | None, str]:
    """
    :param shared: whether another group has layers of the same module
    :param blocks: as in `expression_for`
    :return: arguments of `expression_for` for several layers of one module
    """
    if stem.endswith("experts.#") and not shared:  # engines know them under several names
        return stem, blocks, ".+"
    escaped = dict.fromkeys(r"\d+" if leaf == "#" else re.escape(leaf) for leaf in leaves)
    last = "|".join(escaped)
    return stem, blocks, last if len(leaves) == 1 else f"(?:{last})"


def expression_for(shape: str, blocks: str | None = None, leaf: str | None = None) -> str:
    """
    :param shape: end of a name, with ``#`` for numbers
    :param blocks: the first number, as an expression; None for any
    :param leaf: what follows, as an expression
    :return: a target that matches it under any prefix
    """
    first, *rest = [re.escape(part) for part in shape.split("#")]
    number = r"\d+" if blocks is None else f"(?:{blocks})"
    name = first + "".join((number if i == 0 else r"\d+") + x for i, x in enumerate(rest))
    parts = [part for part in (name, leaf) if part]
    return rf"re:(?:.*\.)?{SEPARATOR.join(parts)}$"


def by_shape(names: Iterable[str]) -> dict[str, list[str]]:
    """:return: names with ``#`` for their numbers -> the names"""
    shapes: dict[str, list[str]] = {}
    for name in names:
        shapes.setdefault(NUMBER.sub("#", name), []).append(name)
    return shapes


def block_of(name: str) -> str:
    """:return: the first number of a name, or nothing"""
    match = NUMBER.search(name)
    return match[0] if match else ""


def shortest(shape: str, others: Iterable[str]) -> str:
    """
    :param shape: a name with ``#`` for numbers
    :return: its end, from the list of its blocks on, that no other shape ends with: engines may
        know the model under another prefix
    """
    parts = shape.split(".")
    first = parts.index("#") if "#" in parts else len(parts)
    for start in range(max(first - 1, 0), -1, -1):
        end = ".".join(parts[start:])
        if not any(other == end or other.endswith(f".{end}") for other in others):
            return end
    return shape
