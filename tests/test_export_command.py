"""`autoround-modifier export`."""

from __future__ import annotations

import json
from pathlib import Path

from test_export import tuned
from test_export_gguf import in_process

from autoround_modifier.cli.main import main

__all__ = ["in_process"]


def test_export(tmp_path, capsys):
    source = str(tuned((4, True, 32)).folder)
    output = str(tmp_path / "out")
    assert main(["export", source, "awq", output]) == 0
    assert "7 layers in awq" in capsys.readouterr().out
    assert main(["export", source, "gptq", output]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", source, "gptq", output, "--overwrite", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["layers"], document["output"]) == ("gptq", 7, output)
    assert document["notes"] == []


def test_refusals_and_notes(tmp_path, capsys):
    source = str(tuned((2, True, 32)).folder)
    assert main(["export", source, "awq", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "refused: `awq` cannot hold this checkpoint; it can be exported to gptq" in error
    assert not (tmp_path / "out").exists()
    assert main(["export", source, "gptq", str(tmp_path / "out")]) == 0
    assert "note: vLLM and SGLang" in capsys.readouterr().err


def test_gguf(tmp_path, capsys, in_process):
    source, output = str(tuned((2, True, 64)).folder), tmp_path / "model.gguf"
    converter = str(Path(__file__).parent / "fake_llama_cpp")
    command = ["export", source, "gguf:q2_0", str(output), "--llama-cpp", converter]
    assert main([*command, "--vocabulary", str(tmp_path / "missing.gguf")]) == 1
    assert "missing.gguf cannot be read as GGUF" in capsys.readouterr().err
    assert main(command) == 0
    assert "7 layers in gguf:q2_0" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
