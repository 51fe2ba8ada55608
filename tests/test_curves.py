"""The table and the picture of benchmarks/curves.py."""

from __future__ import annotations

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from curves import METHODS, SAMPLES, plot, table


def row(name: str, budget: int, kl: float, **fields) -> dict:
    shared = {"model": "small", "text": "wiki", "scheme": "w2", "kl_per_sample": [kl, 2 * kl]}
    measured = {"top1": 0.5, "perplexity": 30.0, "seconds": 100.0 * budget, "peak_mib": 900.0}
    return {"name": name, "budget": budget, "kl": kl, **shared, **measured, **fields}


def test_blocks_of_all_methods_have_the_same_samples_and_steps():
    assert METHODS["GSQ"].at(4) == ("gsq+steps=200", SAMPLES[4])
    assert METHODS["block by block"].at(1)[1] == METHODS["auto-round with alg_ext"].at(1)[1] == 64
    options, samples = METHODS["then end to end"].at(4)
    assert samples == 256
    assert options.startswith(f"default+iters=120+num_calibration_samples={SAMPLES[4]}+")
    assert f"distillation.num_calibration_samples={samples}" in options


def test_seeds_share_a_line():
    rows = [row("GSQ", 4, 1.0), row("GSQ", 4, 2.0), row("block by block", 1, 3.0)]
    *_, blocks, gsq = table(rows).splitlines()
    assert blocks.startswith("| small | wiki | w2 | 1x | block by block | 1 | 3.000 | 6.00 |")
    assert gsq.startswith("| small | wiki | w2 | 4x | GSQ | 2 | 1.500 (1.000 to 2.000) | 3.00 |")


def test_a_picture_has_a_panel_for_each_model_and_text(tmp_path):
    rows = [row("GSQ", 1, 1.0), row("GSQ", 4, 0.9), row("GSQ", 1, 1.1, text="code")]
    plot(rows, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count('id="axes_') == 2
