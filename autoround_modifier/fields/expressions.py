"""Names of layers as fields have them: plain, or regular expressions after ``re:``."""

from __future__ import annotations

import re
from typing import TypeVar

__all__ = ["checked_expressions"]

Names = TypeVar("Names", str, list[str])


def checked_expressions(names: Names) -> Names:
    """
    :param names: of layers or classes, or expressions
    :return: the same
    :raises ValueError: if one begins with ``re:`` and is no regular expression
    """
    for name in [names] if isinstance(names, str) else names:
        if name.startswith("re:"):
            try:
                re.compile(name.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"`{name}` is no regular expression: {error}") from error
    return names
