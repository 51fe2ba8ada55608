"""One reason why an engine refuses or misreads a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from autoround_modifier.errors import listed

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """
    :param engine: whose problem it is, with its version where that matters
    :param what: the engine does, or cannot do
    :param names: of the layers or tensors it is about
    :param remedy: what to change in the recipe
    :param fatal: false where the checkpoint loads, and computes something slightly different
    """

    engine: str
    what: str
    names: tuple[str, ...] = ()
    remedy: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        where = f" ({listed(list(self.names), 3)})" if self.names else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.engine}: {self.what}{where}.{remedy}"
