"""Scores of layers under each scheme, saved as JSON, and the choice for a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoround_modifier.errors import SchemeError
from autoround_modifier.host.schemes import QuantizationScheme
from autoround_modifier.runs.files import write_atomically
from autoround_modifier.schemes.solver import InfeasibleBudgetError, frontier, solve

__all__ = ["Choice", "MeasuredUnit", "Measurement"]


@dataclass(frozen=True)
class MeasuredUnit:
    """
    Layers that get one scheme, with their size and score under each scheme.

    :param name: display name
    :param layers: names of the layers
    :param targets: the same in the syntax of recipes
    :param num_weights: of all of them
    :param bits: in the checkpoint, by scheme; of the schemes that it may have
    :param scores: what is lost, by scheme; the lower the better; of the same schemes
    """

    name: str
    layers: tuple[str, ...]
    targets: tuple[str, ...]
    num_weights: int
    bits: dict[str, int]
    scores: dict[str, float]


@dataclass(frozen=True)
class Measurement:
    """
    All that a choice needs, so that another budget needs no new measurement.

    :param score: how scores were measured, a name in `scores.SCORES`
    :param schemes: by name
    :param units: in the order of the model
    :param other_weights: parameters of the model that are in no unit
    :param other_bits: theirs in the checkpoint
    """

    score: str
    schemes: dict[str, QuantizationScheme]
    units: list[MeasuredUnit]
    other_weights: int
    other_bits: int

    def choose(self, avg_bits: float, whole_model: bool = False) -> Choice:
        """
        :param avg_bits: largest mean of bits for each weight of the units
        :param whole_model: for each parameter of the model
        :return: the choice with the lowest sum of scores
        :raises SchemeError: if no choice fits; says what would
        """
        weights, other_bits = self.counted(whole_model)
        # Half a bit of the whole sum of room for 2.25 bits given as a decimal fraction.
        budget = int(avg_bits * weights + 0.5) - other_bits
        scores = [[unit.scores[name] for name in unit.bits] for unit in self.units]
        bits = [list(unit.bits.values()) for unit in self.units]
        try:
            options = solve(scores, bits, budget)
        except InfeasibleBudgetError:
            low, high = self.range(whole_model)
            raise SchemeError(
                f"avg_bits is {avg_bits}, but with these options the layers take from {low:.4f} to "
                f"{high:.4f} bits per weight, scales and zero points included"
            ) from None
        pairs = zip(self.units, options, strict=True)
        return Choice(self, [list(unit.bits)[option] for unit, option in pairs])

    def range(self, whole_model: bool = False) -> tuple[float, float]:
        """:return: the smallest and the largest budget that make a difference"""
        weights, other_bits = self.counted(whole_model)
        low, high = (
            (sum(end(unit.bits.values()) for unit in self.units) + other_bits) / weights
            for end in (min, max)
        )
        return low, high

    def frontier(self) -> list[tuple[float, float]]:
        """:return: mean bits and summed score of the best choices, from the smallest to the best"""
        weights, _ = self.counted(whole_model=False)
        points = frontier(
            [[unit.scores[name] for name in unit.bits] for unit in self.units],
            [list(unit.bits.values()) for unit in self.units],
        )
        return [(bits / weights, score) for bits, score in points]

    def counted(self, whole_model: bool) -> tuple[int, int]:
        """:return: weights that `avg_bits` is a mean over, and their bits outside of the units"""
        weights = sum(unit.num_weights for unit in self.units)
        return (weights + self.other_weights, self.other_bits) if whole_model else (weights, 0)

    def save(self, path: Path) -> None:
        """
        Write everything to a JSON file, which `load` reads.

        :raises OSError: if the file cannot be written
        """
        content = asdict(self)
        content["schemes"] = {
            name: scheme.model_dump(mode="json", exclude_none=True)
            for name, scheme in self.schemes.items()
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """
        :param path: what `save` wrote
        :raises SchemeError: naming the file, if a field is missing or wrong, a scheme is not known,
            or a score is not a finite number
        :raises OSError: if it cannot be read
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schemes = {
                name: QuantizationScheme.model_validate(scheme)
                for name, scheme in content["schemes"].items()
            }
            units = [
                MeasuredUnit(
                    **{**unit, "layers": tuple(unit["layers"]), "targets": tuple(unit["targets"])}
                )
                for unit in content["units"]
            ]
            loaded = cls(**{**content, "schemes": schemes, "units": units})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SchemeError(f"{path} is not a measurement: {error!r}") from error
        for unit in units:
            allowed = [name for name in schemes if name in unit.bits] or list(schemes)
            for field in ("bits", "scores"):
                _check_numbers(f"{path}: {field} of {unit.name}", getattr(unit, field), allowed)
        return loaded


def _check_numbers(what: str, numbers: Any, names: Iterable[str]) -> None:
    """:raises SchemeError: unless there is a finite number for each name, and no other"""
    if not isinstance(numbers, dict) or set(numbers) != set(names):
        raise SchemeError(f"{what} are not those of {', '.join(names)}")
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise SchemeError(f"{what}: {name} is {value!r}, not a finite number")


@dataclass(frozen=True)
class Choice:
    """
    :param measurement: what was chosen from
    :param schemes: names of the schemes, one for each unit
    """

    measurement: Measurement
    schemes: list[str]

    @property
    def pairs(self) -> list[tuple[MeasuredUnit, str]]:
        """Units, each with the name of its scheme."""
        return list(zip(self.measurement.units, self.schemes, strict=True))

    @property
    def bits(self) -> int:
        """Bits of all units in the checkpoint."""
        return sum(unit.bits[name] for unit, name in self.pairs)

    @property
    def score(self) -> float:
        """Sum of the scores of all units under their schemes; lower is better."""
        return sum(unit.scores[name] for unit, name in self.pairs)

    def avg_bits(self, whole_model: bool = False) -> float:
        """:return: mean of bits for each weight of the units, or each parameter of the model"""
        weights, other_bits = self.measurement.counted(whole_model)
        return (self.bits + other_bits) / weights

    @property
    def model_bytes(self) -> int:
        """Size of all tensors of the checkpoint."""
        return (self.bits + self.measurement.other_bits) // 8

    def config_groups(self) -> dict[str, Any]:
        """:return: the choice in the syntax of recipes, plain data"""
        groups = {}
        for name, scheme in self.measurement.schemes.items():
            units = [unit for unit, chosen in self.pairs if chosen == name]
            if units and scheme.weights is not None:
                fields = scheme.model_dump(mode="json", exclude_unset=True, exclude_none=True)
                targets = [target for unit in units for target in unit.targets]
                groups[name] = {**fields, "targets": targets}
        return groups

    def table(self) -> str:
        """:return: one line for each unit: layers, scheme, bits for each weight, score"""
        units = self.measurement.units
        width = max(len("layers"), *(len(unit.name) for unit in units))
        scheme_width = max(len("scheme"), *map(len, self.measurement.schemes))
        lines = [f"{'layers':{width}}  {'scheme':{scheme_width}}   bits  score"]
        for unit, name in self.pairs:
            bits = unit.bits[name] / unit.num_weights
            lines.append(
                f"{unit.name:{width}}  {name:{scheme_width}}  {bits:5.2f}  {unit.scores[name]:.3e}"
            )
        return "\n".join(lines)
