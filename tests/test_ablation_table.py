"""The table of benchmarks/ablation.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from ablation import effects, said, table


def row(model: str, text: str, seed: int, method: str, kl: float) -> dict:
    return {
        "model": model, "text": text, "seed": seed, "method": method, "kl": kl, "scheme": "w2",
    }  # fmt: skip


ROWS = [
    row("a", "wiki", 1, "default", 1.0),
    row("a", "wiki", 2, "default", 2.0),
    row("a", "wiki", 1, "default+loss=mse", 1.1),
    row("a", "wiki", 2, "default+loss=mse", 2.2 * 1.1),
    row("a", "code", 1, "default+loss=mse", 9.0),  # nothing to compare it with
    row("b", "wiki", 1, "default", 3.0),
]


def test_effects_are_paired_by_model_text_and_seed():
    found = effects(ROWS, "default")
    assert list(found) == [("a", "w2", "default+loss=mse")]
    expected = [math.log(1.1), math.log(1.21)]
    assert found["a", "w2", "default+loss=mse"] == pytest.approx(expected)


def test_the_standard_error_is_that_of_the_mean():
    values = [math.log(1.1), math.log(1.21)]
    # the mean is a factor of 1.1537; deviations of 0.0477 on either side
    assert said(values) == "+15.4% ± 5.5"
    assert said(values[:1]) == "+10.0%"


def test_the_table_has_a_column_for_each_model():
    lines = table(ROWS, "default").splitlines()
    assert lines[0] == "| scheme | changed from `default` | a | b |"
    assert lines[2] == "| w2 | nothing | KL 1.500 | KL 3.000 |"
    assert lines[3] == "| w2 | `loss=mse` | +15.4% ± 5.5 |  |"
