"""A run of this package leaves the files that a page and a card are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import quantize, tiny_llama, weight_scheme

from autoround_modifier import AutoRoundModifier
from autoround_modifier.cli.main import main


def test_a_page_and_a_card_are_made_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    groups = {
        "attention": weight_scheme(4, targets=["re:.*self_attn.*_proj$"]),
        "mlp": weight_scheme(2, targets=["re:.*mlp.*_proj$"]),
    }
    modifier = AutoRoundModifier(iters=2, ignore=["lm_head"], config_groups=groups)
    quantize(tiny_llama(), modifier, output_dir=str(folder))
    capsys.readouterr()

    assert main(["report", str(folder)]) == 0
    page = (folder / "quantization_report.html").read_text()
    for text in (
        "by SignRound in 2 iterations per block on 16 samples of 12 tokens",
        "W2A16 and W4A16 symmetric, groups of 32",
        "Error of the output of each layer.",
        "2 layers left in 16 bits",
        "model.layers.1",
    ):
        assert text in page
    assert page.count("<svg ") >= 7

    assert main(["card", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    assert {"INT4", "INT2"} < set(yaml.safe_load(card.split("---")[1])["tags"])
    assert "INT2, symmetric, groups of 32" in card
    assert "left out: accuracy" in capsys.readouterr().err
