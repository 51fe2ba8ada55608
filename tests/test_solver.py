"""The bit-budget solver: exact, feasible, fast."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_modifier.schemes.solver import InfeasibleBudgetError, frontier, solve

OPTION = st.tuples(
    st.one_of(st.integers(-3, 6).map(float), st.floats(0, 1)),  # cost, with many ties
    st.integers(0, 12),
)
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=6)


def total(rows, choice):
    return sum(row[option] for row, option in zip(rows, choice, strict=True))


@settings(max_examples=300, deadline=None)
@given(ITEMS, st.floats(0, 1))
def test_as_good_as_trying_all(items, share):
    costs = [[cost for cost, _ in item] for item in items]
    sizes = [[size for _, size in item] for item in items]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    budget = low + round(share * (high - low))
    choices = itertools.product(*(range(len(item)) for item in items))
    best = min(total(costs, c) for c in choices if total(sizes, c) <= budget)
    choice = solve(costs, sizes, budget)
    assert total(sizes, choice) <= budget
    assert total(costs, choice) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_thousand_layers_with_eight_options(uniform):
    rng = np.random.default_rng(0)
    count = 1000
    numel = np.full(count, 4096 * 4096) if uniform else rng.integers(10**5, 10**8, count)
    bits = np.array([2.25, 2.5, 3.25, 4.25, 4.5, 5.25, 6.25, 8.25])
    sizes = (numel[:, None] * bits).astype(int).tolist()
    noise = rng.lognormal(0, 2, count)[:, None] * rng.uniform(0.5, 1.5, (count, 8))
    costs = (noise * 4.0**-bits).tolist()
    budget = int(numel.sum() * 3.1)
    started = time.process_time()  # other processes do not count
    choice = solve(costs, sizes, budget)
    assert time.process_time() - started < 2
    assert total(sizes, choice) <= budget
    # No better than the linear relaxation, and nearly as good.
    points = frontier(costs, sizes)
    bound = np.interp(budget, *zip(*points, strict=True))
    assert bound * (1 - 1e-9) < total(costs, choice) < bound * 1.0001


def test_a_budget_below_the_smallest_choice():
    with pytest.raises(InfeasibleBudgetError, match="size 5, the budget is 4"):
        solve([[1.0, 0.0], [0.0]], [[2, 9], [3]], 4)


def test_the_frontier_starts_at_the_smallest_and_ends_at_the_cheapest():
    # the middle option of the second item is above the line between the others
    points = frontier([[4.0, 1.0], [9.0, 8.5, 1.0]], [[1, 2], [0, 2, 4]])
    assert points == [(1, 13.0), (2, 10.0), (6, 2.0)]
