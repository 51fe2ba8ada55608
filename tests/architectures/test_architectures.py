"""Real architectures, with tiny random weights, through LLM-Compressor's pipeline and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from catalogue import CATALOGUE
from checks import Outcome, check


@pytest.mark.parametrize("architecture", CATALOGUE, ids=lambda one: one.name)
def test_architecture(architecture, tmp_path):
    expected = Outcome(traced=architecture.untraced, reloaded=architecture.limitation)
    assert check(architecture, tmp_path) == expected


def test_shared_keys_and_values_need_the_basic_pipeline(tmp_path):
    """
    Gemma 3n's blocks fill a dict that later blocks read; the sequential pipeline of LLM-Compressor
    gives each subgraph a copy of its own.
    """
    (gemma,) = (one for one in CATALOGUE if one.name == "Gemma 3n")
    with pytest.raises(KeyError):
        check(replace(gemma, pipeline="sequential"), tmp_path)
