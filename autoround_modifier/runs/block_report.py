"""What was done to each group of blocks, for logs and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from autoround_modifier.tuning import TuningResult

__all__ = ["BlockReport"]

# How JSON gives the fields of a report.
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
}


@dataclass(frozen=True)
class BlockReport:
    """
    :param name: names of the blocks
    :param initial_loss: held-out loss per token before tuning
    :param best_loss: the same for the rounding that was kept
    :param best_iteration: the iteration that was kept; 0 is the initial rounding
    :param seconds: tuning time
    :param scarce_experts: layers of experts that saw too few tokens to be tuned
    :param failure: what had NaN or infinity, so that the initial rounding was kept
    """

    name: str
    initial_loss: float
    best_loss: float
    best_iteration: int
    seconds: float
    scarce_experts: int = 0
    failure: str | None = None

    @classmethod
    def from_result(cls, name: str, result: TuningResult, scarce_experts: int = 0) -> BlockReport:
        return cls(
            name,
            result.initial_loss,
            result.best_loss,
            result.best_iteration,
            result.seconds,
            scarce_experts,
            result.failure,
        )

    def facts(self) -> dict[str, Any]:
        """:return: the same as JSON values"""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Any) -> BlockReport | None:
        """
        :param facts: what `facts` returned, or None where nothing was tuned
        :raises ValueError: if it is anything else
        """
        if facts is None:
            return None
        types = {field.name: str(field.type) for field in fields(cls)}
        if not isinstance(facts, dict) or set(facts) != set(types):
            raise ValueError(f"expected the fields {', '.join(types)}")
        for name, value in facts.items():
            if not isinstance(value, JSON_TYPES[types[name]]) or isinstance(value, bool):
                raise ValueError(f"`{name}` is {value!r}, not {types[name]}")
        return cls(**facts)

    def __str__(self) -> str:
        return (
            f"{self.name}: held-out loss {self.initial_loss:.3e} -> {self.best_loss:.3e} "
            f"(iteration {self.best_iteration}), {self.seconds:.1f} s"
        )
