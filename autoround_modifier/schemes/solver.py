"""
The exact choice of one option for each item under a budget: the multiple-choice knapsack problem.

The linear relaxation gives a price for a unit of size. At that price every option has a reduced
cost, what it costs beyond the best option of its item, and no solution better than a known one can
contain options whose reduced costs sum up to more than the gap between that solution and the bound
of the relaxation. What is left is small enough for dynamic programming over Pareto-optimal states
(Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["InfeasibleBudgetError", "frontier", "solve"]

# Relative; sums of costs in another order differ by less.
TOLERANCE = 1e-9
# Kept at most. Only items whose options cost the same for their size need as many; beyond that, the
# choice is the best of those followed.
MAX_STATES = 200_000

Number = TypeVar("Number", int, float)


class InfeasibleBudgetError(ValueError):
    """A budget below the size of the smallest choice."""


@dataclass(frozen=True)
class _Step:
    """From one option of an item to the next on the lower convex hull of its (size, cost)."""

    item: int
    option: int
    size: int
    cost: float

    @property
    def price(self) -> float:
        """What a unit of size saves, > 0; it falls from step to step of an item."""
        return -self.cost / self.size


def solve(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """
    :param costs: of each option of each item, finite
    :param sizes: the same, >= 0
    :param budget: largest sum of sizes
    :return: one option of each item, so that the sum of costs is the lowest
    :raises InfeasibleBudgetError: if even the smallest options do not fit
    """
    choice, steps = _relaxation(costs, sizes)
    if (smallest := _total(sizes, choice)) > budget:
        raise InfeasibleBudgetError(
            f"the smallest choice has size {smallest}, the budget is {budget}"
        )
    room = budget - smallest
    bound = _total(costs, choice)
    left = iter(steps)
    for step in left:
        if step.size > room:
            price = step.price
            bound -= price * room
            break
        room -= step.size
        bound += step.cost
        choice[step.item] = step.option
    else:
        return choice  # the cheapest options fit all together
    # The relaxation takes a fraction of this step. Later ones may fit as a whole; each is one of
    # its item's options, even where an earlier one of the item was left out.
    for step in left:
        grown = sizes[step.item][step.option] - sizes[step.item][choice[step.item]]
        saved = costs[step.item][step.option] - costs[step.item][choice[step.item]]
        if grown <= room and saved < 0:
            room -= grown
            choice[step.item] = step.option
    better = _improve(costs, sizes, budget, price, bound, _total(costs, choice))
    return choice if better is None else better


def frontier(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]
) -> list[tuple[int, float]]:
    """
    :return: sum of sizes and sum of costs of the choices on the lower convex hull of all, from the
        smallest to the cheapest: what a budget buys
    """
    choice, steps = _relaxation(costs, sizes)
    points = [(_total(sizes, choice), _total(costs, choice))]
    for step in steps:
        size, cost = points[-1]
        points.append((size + step.size, cost + step.cost))
    return points


def _total(values: Sequence[Sequence[Number]], choice: list[int]) -> Number:
    return sum(row[option] for row, option in zip(values, choice, strict=True))


def _relaxation(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]
) -> tuple[list[int], list[_Step]]:
    """
    :return: the smallest option of each item, and the steps from there to the cheapest, those that
        save most for their size first; taken in that order, they solve the linear relaxation
    """
    choice, steps = [], []
    for item, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        order = sorted(range(len(cost)), key=lambda option: (size[option], cost[option]))
        hull = order[:1]
        for option in order[1:]:
            if cost[option] >= cost[hull[-1]]:
                continue
            while len(hull) > 1 and _is_above(cost, size, hull[-2], hull[-1], option):
                hull.pop()
            hull.append(option)
        choice.append(hull[0])
        steps += [
            _Step(item, after, size[after] - size[before], cost[after] - cost[before])
            for before, after in pairwise(hull)
        ]
    # Stable, so that steps of one item stay in their order.
    steps.sort(key=lambda step: -step.price)
    return choice, steps


def _is_above(
    cost: Sequence[float], size: Sequence[int], left: int, middle: int, right: int
) -> bool:
    """:return: whether an option is on or above the line between two others"""
    drop = (cost[left] - cost[middle]) * (size[right] - size[left])
    return drop <= (cost[left] - cost[right]) * (size[middle] - size[left])


def _improve(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    budget: int,
    price: float,
    bound: float,
    best: float,
) -> list[int] | None:
    """
    Dynamic programming over what can be better than a known solution.

    :param price: of a unit of size in the linear relaxation
    :param bound: the relaxation's cost, which no solution undercuts
    :param best: cost of the known solution
    :return: a solution that costs less, the best there is; None if there is none
    """
    gap = best - bound
    if gap <= TOLERANCE * max(abs(best), abs(bound)):
        return None
    items = [_Reduced.of(c, s, price, gap) for c, s in zip(costs, sizes, strict=True)]
    # Items with one option left change nothing but a constant; the others one after the other.
    smallest_rest = np.cumsum([0, *(int(item.sizes.min()) for item in reversed(items))])[::-1]
    largest_rest = np.cumsum([0, *(int(item.sizes.max()) for item in reversed(items))])[::-1]
    size = np.zeros(1, dtype=np.int64)
    excess = np.zeros(1)  # sum of reduced costs
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for position, item in enumerate(items):
        new_size = (size[:, None] + item.sizes).ravel()
        new_excess = (excess[:, None] + item.excess).ravel()
        # Size that stays unused is paid for as well.
        unused = np.maximum(budget - new_size - largest_rest[position + 1], 0)
        alive = np.flatnonzero(
            (new_excess + price * unused < gap) & (new_size + smallest_rest[position + 1] <= budget)
        )
        cost = new_excess[alive] - price * new_size[alive]  # the true cost, up to a constant
        order = np.lexsort((cost, new_size[alive]))
        cheapest = np.minimum.accumulate(cost[order])
        pareto = np.ones(len(order), dtype=bool)
        pareto[1:] = cheapest[1:] < cheapest[:-1]
        kept = alive[order[pareto]]
        if len(kept) > MAX_STATES:
            kept = np.sort(kept[np.argsort(new_excess[kept], kind="stable")[:MAX_STATES]])
        size, excess = new_size[kept], new_excess[kept]
        history.append((kept // len(item.options), item.options[kept % len(item.options)]))
        if not len(kept):
            return None
    state = int(np.argmin(excess - price * size))
    choice = []
    for parents, options in reversed(history):
        choice.append(int(options[state]))
        state = int(parents[state])
    choice.reverse()
    return choice if _total(costs, choice) < best else None


@dataclass(frozen=True)
class _Reduced:
    """
    The options of an item that a better solution can contain.

    :param options: their indices
    :param sizes: of each
    :param excess: reduced cost of each: cost and price of its size beyond those of the item's best
    """

    options: NDArray[np.int64]
    sizes: NDArray[np.int64]
    excess: NDArray[np.float64]

    @classmethod
    def of(cls, costs: Sequence[float], sizes: Sequence[int], price: float, gap: float) -> _Reduced:
        size = np.asarray(sizes, dtype=np.int64)
        excess = np.asarray(costs, dtype=np.float64) + price * size
        excess -= excess.min()
        options = np.flatnonzero(excess < gap)
        return cls(options, size[options], excess[options])
