"""What was done to each group of blocks, for logs and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["BlockReport", "LayerReport"]

# How JSON gives the fields of a report.
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "tuple[LayerReport, ...]": (list,),
}


@dataclass(frozen=True)
class LayerReport:
    """
    Errors are squared errors of the output, relative to its squared length, on held-out samples.
    They are None where the layer was not tuned, or no sample reached it.

    :param name: of the layer
    :param initial_error: of the rounding that tuning started from
    :param error: of the rounding that was kept
    :param moved: values that differ between the two
    :param tokens: calibration tokens that an expert received; None for other layers
    """

    name: str
    initial_error: float | None = None
    error: float | None = None
    moved: int = 0
    tokens: int | None = None


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
    :param layers: of the blocks, in the order of the model
    """

    name: str
    initial_loss: float
    best_loss: float
    best_iteration: int
    seconds: float
    scarce_experts: int = 0
    failure: str | None = None
    layers: tuple[LayerReport, ...] = ()

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
        given = _checked(cls, facts)
        layers = tuple(LayerReport(**_checked(LayerReport, layer)) for layer in given["layers"])
        return cls(**{**given, "layers": layers})

    def __str__(self) -> str:
        return (
            f"{self.name}: held-out loss {self.initial_loss:.3e} -> {self.best_loss:.3e} "
            f"(iteration {self.best_iteration}), {self.seconds:.1f} s"
        )


def _checked(kind: type, facts: Any) -> dict[str, Any]:
    """
    :param kind: a dataclass
    :raises ValueError: if the facts are not its fields
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    if not isinstance(facts, dict) or set(facts) != set(types):
        raise ValueError(f"expected the fields {', '.join(types)}")
    for name, value in facts.items():
        if not isinstance(value, JSON_TYPES[types[name]]) or isinstance(value, bool):
            raise ValueError(f"`{name}` is {value!r}, not {types[name]}")
    return facts
