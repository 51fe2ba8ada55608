"""Two checkpoints side by side, from their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import weight_scheme

from autoround_modifier.cli.main import main
from autoround_modifier.report.schema import (
    EVALUATION_FILE,
    REPORT_FILE,
    DivergenceRecord,
    Evaluation,
    LayerRecord,
    ModelRecord,
    QuantizationReport,
    SizeRecord,
    TaskResult,
    TextRecord,
)


def layer(kind: str, block: int, scheme: str, bits: float, error: float, **fields) -> LayerRecord:
    facts = {"weights": 100, "error_of": "output", "initial_error": None, "moved": 0, **fields}
    return LayerRecord(
        name=f"model.layers.{block}.{kind}",
        kind=kind,
        block=block,
        scheme=scheme,
        bits_per_weight=bits,
        error=error,
        **facts,
    )


def save(folder: Path, layers: list[LayerRecord], quantized: float, digest: str = "d") -> Path:
    """A folder with a report and an evaluation."""
    folder.mkdir()
    report = QuantizationReport(
        versions={},
        device="cpu",
        started="2026-01-01T00:00:00Z",
        seconds=12.0,
        command=None,
        recipe="",
        recipe_name=folder.name,
        model=ModelRecord(source="someone/tiny", architecture="LlamaForCausalLM", parameters=400),
        data=None,
        phases=[],
        blocks=[],
        layers=layers,
        unquantized=[],
        size=SizeRecord(
            original_bytes=800, saved_bytes=200, quantized_weights=400, quantized_bits=2.5
        ),
    )
    (folder / REPORT_FILE).write_text(report.model_dump_json())
    evaluation = Evaluation(
        versions={},
        original="someone/tiny",
        quantized=str(folder),
        commands=[],
        text=TextRecord(source="held-out.txt", digest=digest, samples=1, length=10),
        divergence=DivergenceRecord(kl=0.25, top1=0.9, perplexity=11.0, original_perplexity=10.0),
        tasks=[TaskResult(task="arc", metric="acc", original=0.5, quantized=quantized)],
    )
    (folder / EVALUATION_FILE).write_text(evaluation.model_dump_json())
    return folder


@pytest.fixture
def pair(tmp_path) -> tuple[str, str]:
    """Uniform, and mixed: the second's `down_proj` of block 1 has more bits."""
    uniform = [layer(kind, i, "W2", 2.5, 0.1) for i in range(2) for kind in ("q_proj", "down_proj")]
    mixed = [*uniform[:-1], layer("down_proj", 1, "W4", 4.5, 0.02, weights=300)]
    first = save(tmp_path / "uniform", uniform, 0.4)
    second = save(tmp_path / "mixed", mixed, 0.45)
    return str(first), str(second)


def test_json(pair, capsys):
    assert main(["compare", *pair, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [side["schemes"] for side in found["sides"]] == [{"W2": 4}, {"W2": 3, "W4": 1}]
    assert [side["recipe"] for side in found["sides"]] == ["uniform", "mixed"]
    assert [side["quantized_bits"] for side in found["sides"]] == [2.5, 2.5]
    assert found["same_text"] is True
    (kind,) = found["kinds"]
    assert kind["kind"] == "down_proj"
    assert kind["schemes"] == [{"W2": 2}, {"W2": 1, "W4": 1}]
    assert kind["bits"] == pytest.approx([2.5, (100 * 2.5 + 300 * 4.5) / 400])
    assert kind["error"] == pytest.approx([0.1, 0.06])
    (task,) = found["tasks"]
    assert task["values"] == [0.4, 0.45]
    assert task["recovery"] == pytest.approx([0.8, 0.9])


def test_tables(pair, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", *pair]) == 0
    out = capsys.readouterr().out
    for words in (
        "bits per quantized weight",
        "0.25000",
        "90.00 %",
        "0.4500 (90.00 %)",
        "down_proj",
    ):
        assert words in out
    assert "different samples" not in out


def test_other_text(pair, tmp_path, capsys):
    other = save(tmp_path / "other", [], 0.1, digest="e")
    assert main(["compare", pair[0], str(other / REPORT_FILE)]) == 0
    assert "different samples and cannot be compared" in capsys.readouterr().out


def test_without_a_report(pair, tmp_path, capsys):
    plain = tmp_path / "plain"
    plain.mkdir()
    scheme = weight_scheme(4)
    groups = {"a": scheme, "b": {**scheme, "input_activations": {"num_bits": 8}}}
    config = {"quantization_config": {"config_groups": groups}}
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "model.safetensors").write_bytes(bytes(1000))
    assert main(["compare", str(plain), pair[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["sides"][0]["schemes"]) == [
        "W4A16 G32",
        "W4A8 G32 static",
    ]
    assert found["sides"][0]["saved_bytes"] == 1000
    assert found["kinds"] == []
    assert found["tasks"][0]["values"] == [None, 0.45]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "not quantized"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_other_formats(pair, tmp_path, capsys, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["compare", str(tmp_path), pair[0], "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["sides"][0]["schemes"]) == [expected]


def test_refused(pair, tmp_path, capsys):
    assert main(["compare", pair[0], str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not there" in capsys.readouterr().err
    assert main(["compare", pair[0], str(tmp_path)]) == 1
    assert "holds neither quantization_report.json nor config.json" in capsys.readouterr().err
    (Path(pair[1]) / EVALUATION_FILE).write_text("{")
    assert main(["compare", *pair]) == 1
    assert EVALUATION_FILE in capsys.readouterr().err
