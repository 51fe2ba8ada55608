"""
How targets find their layers: by compressed-tensors, and by vLLM.

A target is a name, an expression after ``re:`` that must match from the beginning of a name, or the
name of a class. Both prefer names and expressions to classes. Where several match,
compressed-tensors 0.19 takes an exact name, else the alphabetically first expression; vLLM 0.32
takes the first in the order of ``config.json``, and the name of a fused layer before those of its
parts. So does SGLang 0.5.23, which may know the name of a fused layer alone: `sglang_loader`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from autoround_modifier.engines.fused import fused_names

__all__ = ["Groups", "Names", "Targets", "groups_of"]

# Group name -> its targets, in the order of the file
Groups = Mapping[str, Sequence[str]]


def groups_of(quantization: Mapping) -> dict[str, list[str]]:
    """
    :param quantization: ``quantization_config`` of a ``config.json``
    :return: the targets of each config group
    """
    groups = quantization.get("config_groups") or {}
    return {name: list(group.get("targets") or []) for name, group in groups.items()}


class Names:
    """
    Names and expressions; ``in`` tells whether one of them is a name, or matches it.

    :param entries: of ``ignore``, or targets
    """

    def __init__(self, entries: Iterable[str]):
        entries = list(entries)
        self._exact = {entry for entry in entries if not _is_expression(entry)}
        self._expressions = [_compiled(entry) for entry in entries if _is_expression(entry)]

    def __contains__(self, name: str) -> bool:
        return name in self._exact or any(x.match(name) for x in self._expressions)


class Targets:
    """
    Finds the config group of a layer.

    :param groups: of a config
    """

    def __init__(self, groups: Groups):
        self._pairs = [(target, group) for group, targets in groups.items() for target in targets]
        self._owners = dict(self._pairs)
        expressions = [target for target in self._owners if _is_expression(target)]
        self._sorted = [(_compiled(x), self._owners[x]) for x in sorted(expressions)]
        self._placed = [
            (place, _compiled(target), group)
            for place, (target, group) in enumerate(self._pairs)
            if _is_expression(target)
        ]
        self._places = {target: i for i, (target, _) in reversed(list(enumerate(self._pairs)))}

    @property
    def rules(self) -> tuple[Callable[[str, str], str | None], ...]:
        """That of compressed-tensors, and that of vLLM."""
        return self.compressed_tensors, self.vllm

    def compressed_tensors(self, name: str, kind: str) -> str | None:
        """
        :param name: of a layer
        :param kind: ``Linear``, ``Embedding`` or ``Head``: its class, or that from which its class
            is derived; a head that predicts tokens is linear here
        :return: the group whose scheme compressed-tensors gives it
        """
        kind = "Linear" if kind == "Head" else kind
        if name in self._owners:
            return self._owners[name]
        matched = (group for expression, group in self._sorted if expression.match(name))
        return next(matched, self._owners.get(kind))

    def vllm(self, name: str, kind: str) -> str | None:
        """
        :return: the group whose scheme vLLM gives a layer of this name. Its linear layers contain
            ``Linear`` in their class, whatever that of the model is called; its heads do not
        """
        for known in (*fused_names(name), name):
            exact = self._places.get(known)
            for place, expression, group in self._placed:
                if exact is not None and place > exact:
                    break
                if expression.match(known):
                    return group
            if exact is not None:
                return self._pairs[exact][1]
        return self._owners.get(kind)


def _is_expression(entry: str) -> bool:
    return entry.startswith("re:")


@functools.lru_cache(maxsize=4096)
def _compiled(entry: str) -> re.Pattern[str]:
    return re.compile(entry.removeprefix("re:"))
