"""The size of an exported checkpoint, told from shapes alone, is that of the files."""

from __future__ import annotations

import pytest
from conftest import tiny_llama
from export_sources import quantized_model, tuned

from autoround_modifier import ExportError, export, plan
from autoround_modifier.cli.main import main
from autoround_modifier.cli.outcome import DONE, REFUSED
from autoround_modifier.exports.predicted import predict_specs
from autoround_modifier.exports.sizes import exported_bytes

SCHEMES = [(4, True, 32), (4, False, 32), (2, False, 64), (8, True, None)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_the_files(scheme, tmp_path):
    layers = predict_specs(quantized_model(scheme), (), "the model")
    folder = tuned(scheme).folder
    made = 0
    for format in ("gptq", "awq", "auto_round", "mlx"):
        try:
            exported = export(folder, format, tmp_path / format)
        except ExportError:
            continue
        made += 1
        assert exported_bytes(format, layers) == exported.bytes, format
    assert made == {(4, 32): 4, (2, 64): 3, (8, None): 2}[scheme[0], scheme[2]]


def test_gguf():
    layers = predict_specs(quantized_model((2, True, 64)), (), "the model")
    weights = sum(spec.out_features * spec.in_features for spec in layers.specs)
    assert exported_bytes("gguf:q2_0", layers) == layers.others + weights * 18 // 64
    assert exported_bytes("gguf:auto", layers) == exported_bytes("gguf:q2_0", layers)
    assert exported_bytes("gguf:q8_0", layers) == layers.others + weights * 34 // 32


def test_plan(capsys):
    model = tiny_llama(num_layers=1, hidden_size=128).config._name_or_path
    found = plan(model, scheme="W4A16G32", formats="compressed-tensors,gptq")
    assert "exported to gptq" in [part.name for part in found.disk]
    arguments = ["plan", model, "--scheme", "W4A16G32", "--disk", "1GB", "--ram", "100GB"]
    assert main([*arguments, "--format", "gptq,gguf:q4_0"]) == DONE
    shown = capsys.readouterr().out
    assert "exported to gptq" in shown
    assert "while GGUF is written" in shown
    assert main([*arguments, "--format", "gguf:q2_0"]) == REFUSED
    assert "`gguf:q2_0` cannot hold" in capsys.readouterr().err
