"""
Objects among the arguments of a block that hold tensors, such as a cache of keys and values.

A block may write into them, and a later block may read what it wrote (Gemma 3n shares keys and
values in this way). So that a call can run again from the same state, any number of times, such
objects are taken apart when the call is recorded, and made anew for each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils._pytree import (
    GetAttrKey,
    keystr,
    register_pytree_node,
    tree_flatten_with_path,
    tree_map,
)

__all__ = ["put_together", "take_apart", "tensors_by_place"]


@dataclass
class ObjectParts:
    """
    One object, taken apart; an inner node of PyTorch's trees.

    :ivar kind: its class
    :ivar number: of the object within the tree
    :ivar attributes: those of the instance, by name
    :ivar items: entries of a subclass of dict or list; None for other classes
    """

    kind: type
    number: int
    attributes: dict[str, Any]
    items: dict[Any, Any] | list[Any] | None


@dataclass
class SameObject:
    """Stands where an object of the tree appears again; a node without children."""

    number: int


register_pytree_node(
    ObjectParts,
    lambda parts: ([parts.attributes, parts.items], (parts.kind, parts.number)),
    lambda children, context: ObjectParts(*context, *children),
    flatten_with_keys_fn=lambda parts: (
        [(GetAttrKey("attributes"), parts.attributes), (GetAttrKey("items"), parts.items)],
        (parts.kind, parts.number),
    ),
)
register_pytree_node(
    SameObject,
    lambda same: ([], same.number),
    lambda children, number: SameObject(number),
    flatten_with_keys_fn=lambda same: ([], same.number),
)


def take_apart(tree: Any) -> Any:
    """
    :param tree: arguments of a call
    :return: a tree whose dicts and lists are new, with `ObjectParts` for objects that may hold
        tensors; the tensors are the same
    """
    numbers: dict[int, int] = {}

    def apart(value: Any) -> Any:
        if not _may_hold_tensors(value) or _without_content(type(value)) is None:
            return value
        if id(value) in numbers:
            return SameObject(numbers[id(value)])
        number = numbers[id(value)] = len(numbers)
        items: dict[Any, Any] | list[Any] | None = None
        if isinstance(value, dict):
            items = dict(value.items())
        elif isinstance(value, list):
            items = list(value)
        return ObjectParts(
            type(value), number, tree_map(apart, dict(vars(value))), tree_map(apart, items)
        )

    return tree_map(apart, tree)


def put_together(tree: Any) -> Any:
    """
    :param tree: from `take_apart`
    :return: the same arguments, with objects made anew
    """
    objects: dict[int, Any] = {}

    def together(value: Any) -> Any:
        if isinstance(value, SameObject):
            return objects[value.number]
        if not isinstance(value, ObjectParts):
            return value
        made = objects[value.number] = _without_content(value.kind)
        vars(made).update(tree_map(together, value.attributes, is_leaf=_is_apart))
        items = tree_map(together, value.items, is_leaf=_is_apart)
        if isinstance(items, dict):
            dict.update(made, items)
        elif isinstance(items, list):
            list.extend(made, items)
        return made

    return tree_map(together, tree, is_leaf=_is_apart)


def tensors_by_place(tree: Any) -> dict[str, Tensor]:
    """
    :param tree: arguments of a call, as they are or from `take_apart`
    :return: all tensors in them, by their place in the tree
    """
    leaves, _ = tree_flatten_with_path(take_apart(tree))
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _is_apart(value: Any) -> bool:
    return isinstance(value, (ObjectParts, SameObject))


def _may_hold_tensors(value: Any) -> bool:
    """:return: whether it is an object with attributes, and neither code nor a constant"""
    return (
        hasattr(value, "__dict__")
        and not callable(value)
        and not isinstance(value, (Tensor, Enum, ModuleType))
        and type(value).__module__.partition(".")[0] != "torch"
    )


def _without_content(kind: type) -> Any:
    """:return: an instance without attributes and entries; None if there can be none"""
    base: Any = next((x for x in (dict, list) if issubclass(kind, x)), object)
    try:
        return base.__new__(kind)
    except TypeError:  # a subclass of another built-in class, such as int, or an abstract class
        return None
