"""Changes to modules that are undone on exit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["forwards_replaced", "parameters_frozen"]


@contextlib.contextmanager
def forwards_replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """
    Let modules compute by other functions. Only ``forward`` is exchanged, on the instance: hooks,
    such as online rotations, stay in force, and parameters are not touched.
    """
    saved = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, original in saved.items():
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original


@contextlib.contextmanager
def parameters_frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No gradients for the parameters of these modules."""
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
