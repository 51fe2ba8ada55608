"""Changes to modules that are undone on exit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["forwards_replaced", "hooks_registered"]


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
def hooks_registered(*registrations: Callable[[], RemovableHandle]) -> Iterator[None]:
    """
    Register hooks, and remove them on exit.

    :param registrations: each registers one hook
    """
    with contextlib.ExitStack() as stack:
        for register in registrations:
            stack.callback(register().remove)
        yield
