"""What benchmarks/accuracy.py gives to the peers."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from accuracy import weights_of
from peers import auto_round_scheme


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w2", {"scheme": "W4A16", "bits": 2, "sym": True, "group_size": 64}),
        ("w3-asym", {"scheme": "W4A16", "bits": 3, "sym": False, "group_size": 64}),
        # the recipe has groups of 128
        ("w4a16_autoround", {"scheme": "W4A16", "bits": 4, "sym": True, "group_size": 64}),
        ("mxfp4a16_autoround", {"scheme": "MXFP4", "act_bits": 16}),
        (
            "nvfp4a16_autoround",
            {"scheme": "NVFP4", "act_bits": 16, "act_data_type": "float"},
        ),
    ],
)
def test_auto_round_gets_the_same_weights(scheme, expected):
    assert auto_round_scheme(weights_of(scheme, group_size=64)) == expected


def test_peers_are_not_compared_where_activations_are_quantized():
    with pytest.raises(SystemExit, match=r"mxfp4_autoround: .*without quantized activations"):
        weights_of("mxfp4_autoround", group_size=64)


def test_peers_are_not_compared_in_formats_that_they_lack():
    with pytest.raises(SystemExit, match="auto-round is compared in"):
        auto_round_scheme(weights_of("fp8a16_autoround", group_size=64))
