"""A run that writes other formats too: places, refusals before it, and what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_llama, tiny_tokenizer, weight_scheme
from test_export_gguf import in_process
from tiny_mixtures import tiny_mixture

from autoround_modifier import (
    AutoRoundModifier,
    AutoSchemeModifier,
    ExportError,
    FailedError,
    OutputExistsError,
    export,
    oneshot,
    quantize,
)
from autoround_modifier.cli.main import main
from autoround_modifier.cli.outcome import DONE, FAILED, REFUSED
from autoround_modifier.exports import written_files
from autoround_modifier.report.schema import read_report
from autoround_modifier.run_outputs import RunOutputs, read_formats

__all__ = ["in_process"]
RTN = ("--preset", "rtn", "--quiet")
FAKE_LLAMA_CPP = str(Path(__file__).parent / "fake_llama_cpp")


@pytest.fixture(autouse=True)
def _no_converter(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_ROOT", raising=False)


@pytest.fixture
def model() -> str:
    return tiny_llama(num_layers=1).config._name_or_path


def method_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------- names and places


def test_names():
    assert read_formats(None) == ("compressed-tensors",)
    assert read_formats("gptq, AWQ,gguf:q4_0,gptq") == ("gptq", "awq", "gguf:q4_0")
    assert read_formats(["gptq,awq", "auto-round"]) == ("gptq", "awq", "auto_round")
    assert read_formats("llm_compressor,auto_gptq,auto_awq") == (
        "compressed-tensors",
        "gptq",
        "awq",
    )
    for wrong in ("exl3", "", ","):
        with pytest.raises(ExportError, match="compressed-tensors"):
            read_formats(wrong)


@pytest.mark.parametrize(
    ("formats", "checkpoint", "exports"),
    [
        ("compressed-tensors", "out", {}),
        ("gptq", "out-compressed-tensors", {"gptq": "out"}),
        ("gguf:q4_0", "out-compressed-tensors", {"gguf:q4_0": "out/out-q4_0.gguf"}),
        ("gptq,awq", "out/compressed-tensors", {"gptq": "out/gptq", "awq": "out/awq"}),
        (
            "compressed-tensors,gguf:q2_0",
            "out/compressed-tensors",
            {"gguf:q2_0": "out/out-q2_0.gguf"},
        ),
    ],
)
def test_places(formats, checkpoint, exports, tmp_path):
    outputs = RunOutputs.of(tmp_path / "out", read_formats(formats))
    assert outputs.checkpoint == tmp_path / checkpoint
    assert outputs.exports == {name: tmp_path / path for name, path in exports.items()}
    assert outputs.is_kept == ("compressed-tensors" in formats)
    assert outputs.report == (outputs.checkpoint if outputs.is_kept else tmp_path / "out")


# ---------------------------------------------------------------------- runs


def test_several_formats(model, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--scheme", "W4A16G32", *RTN, "--format", "compressed-tensors,gptq", "--format"]
    assert main(["quantize", model, *arguments, "awq", "-o", str(output), "--json"]) == DONE
    document = json.loads(capsys.readouterr().out)
    folders = {name: output / name for name in ("compressed-tensors", "gptq", "awq")}
    assert document["formats"] == {name: str(path) for name, path in folders.items()}
    assert names(output) == sorted(folders)
    for name, folder in folders.items():
        assert method_of(folder) == name
        assert (folder / "tokenizer.json").is_file()
    assert read_report(folders["compressed-tensors"]).model_dump(mode="json") == document["report"]
    export(folders["compressed-tensors"], "gptq", tmp_path / "again")
    written = [
        (x / "model.safetensors").read_bytes() for x in (folders["gptq"], tmp_path / "again")
    ]
    assert written[0] == written[1]


def test_one_other_format_takes_the_folder(model, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--scheme", "W4A16G32", *RTN, "--format", "awq", "-o", str(output)]
    assert main(["quantize", model, *arguments]) == DONE
    assert names(tmp_path) == ["out"]
    assert method_of(output) == "awq"
    shown = capsys.readouterr().out
    assert f"awq: {output}" in shown
    assert f"report {output}" in shown
    assert "inspect" not in shown
    assert len(read_report(output).layers) == 7
    assert main(["quantize", model, *arguments]) == REFUSED
    assert main(["quantize", model, *arguments, "--overwrite"]) == DONE


def test_in_python(tmp_path, in_process):
    scheme = {"group_0": weight_scheme(2, True, 64)}
    arguments = {"tokenizer": tiny_tokenizer(), "llama_cpp": FAKE_LLAMA_CPP}
    quantize(
        tiny_llama(num_layers=1),
        scheme,
        preset="rtn",
        output_dir=tmp_path / "out",
        formats=["gptq", "gguf:q2_0"],
        oneshot_arguments=arguments,
    )
    assert names(tmp_path / "out") == ["gptq", "out-q2_0.gguf", "quantization_report.json"]
    with pytest.raises(ExportError, match="without `output_dir`"):
        oneshot(tiny_llama(num_layers=1), "w4a16_autoround", formats="gptq")


def test_what_is_tuned_in_a_scheme_of_gguf(model, tmp_path, in_process, capsys, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_ROOT", FAKE_LLAMA_CPP)
    wide = tiny_llama(num_layers=1, hidden_size=256).config._name_or_path
    arguments = ["--scheme", "gguf:q4_k_m", *RTN, "--format", "gguf:q4_k_m"]
    output = tmp_path / "out"
    assert main(["quantize", wide, *arguments, "-o", str(output)]) == DONE
    assert names(output) == ["out-q4_k_m.gguf", "quantization_report.json"]
    modifier = AutoRoundModifier(scheme="gguf:q4_k_m", ignore=["lm_head"], preset="rtn")
    in_memory = oneshot(tiny_llama(num_layers=1, hidden_size=256), modifier)
    export(in_memory, "gguf:q4_k_m", tmp_path / "memory.gguf")
    written = (output / "out-q4_k_m.gguf").read_bytes()
    assert (tmp_path / "memory.gguf").read_bytes() == written
    capsys.readouterr()
    refused = ["quantize", wide, "-o", str(tmp_path / "other")]
    assert main([*refused, "--scheme", "gguf:q4_k_m", "--format", "gptq"]) == REFUSED
    assert "leave the format to gguf:q4_k_m" in capsys.readouterr().err
    assert main([*refused, "--scheme", "W4A16", "--format", "gguf:q4_k_m"]) == REFUSED
    assert "write `scheme: gguf:q4_k_m`" in capsys.readouterr().err


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def no_run(monkeypatch):
    """Fails if weights would be loaded."""
    from autoround_modifier import entrypoint, job

    monkeypatch.setattr(job, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(entrypoint, "host_oneshot", lambda *_, **__: pytest.fail("it ran"))


@pytest.mark.parametrize(
    ("scheme", "format", "said"),
    [
        ("W2A16G32", "awq", "exported to gptq, auto_round"),
        ("W4A16G32", "gguf:q2_0", "it holds 2 bits"),
        ("W8A8", "gptq", "quantizes activations"),
        ("FP8", "compressed-tensors,gptq", "is no integer format"),
        ("W4A16G32", "exl3", "no format `exl3`"),
        ("W4A16G32", "gguf:q4_0", "LLAMA_CPP_ROOT"),
    ],
)
def test_refused_before_weights_are_loaded(scheme, format, said, model, no_run, tmp_path, capsys):
    arguments = ["--scheme", scheme, *RTN, "--format", format]
    if said != "LLAMA_CPP_ROOT":
        arguments += ["--llama-cpp", FAKE_LLAMA_CPP]
    arguments += ["-o", str(tmp_path / "out")]
    assert main(["quantize", model, *arguments]) == REFUSED
    shown = capsys.readouterr().err
    assert said in shown
    assert "down_proj" in shown or "format `" in shown or "llama.cpp" in shown
    assert main(["quantize", model, *arguments[:-2], "--dry-run"]) == REFUSED
    assert said in capsys.readouterr().err
    assert names(tmp_path) == []


def test_options_are_checked_one_by_one(model, no_run, tmp_path, capsys):
    budget = ["--bits", "5", "--format", "awq", "-o", str(tmp_path / "out")]
    assert main(["quantize", model, "--options", "W4A16G32,W8A16G32", *budget]) == REFUSED
    assert "it holds 4 bits" in capsys.readouterr().err
    assert main(["quantize", model, "--options", "W4A16G32,W4A16G64", *budget]) == REFUSED
    assert "other group sizes" in capsys.readouterr().err
    budget.append("--dry-run")
    assert main(["quantize", model, "--options", "W4A16G32,UNQUANTIZED", *budget]) == DONE


@pytest.mark.parametrize("in_memory", [True, False])
def test_oneshot_refuses_before_it_runs(in_memory, model, no_run, tmp_path):
    source = tiny_llama(num_layers=1) if in_memory else model
    modifier = AutoRoundModifier(scheme="W2A16", ignore=["lm_head"], iters=2)
    with pytest.raises(ExportError, match="`awq` cannot hold"):
        oneshot(source, modifier, output_dir=tmp_path / "out", formats="awq")
    assert modifier.config_groups is None
    choice = [
        AutoSchemeModifier(options=["W2A16G32", "W4A16G32"], avg_bits=4.5),
        AutoRoundModifier(iters=2),
    ]
    with pytest.raises(ExportError, match="`awq` cannot hold"):
        oneshot(source, choice, output_dir=tmp_path / "out", formats="awq")


def test_experts_are_found_before_the_run(no_run, tmp_path):
    model = tiny_mixture(tmp_path / "mixture", "Mixtral")
    modifier = AutoRoundModifier(
        config_groups={"group_0": weight_scheme(4, True, 32)}, ignore=["lm_head"], iters=2
    )
    with pytest.raises(ExportError, match=r"experts of a mixture.*experts\.0\.w1"):
        oneshot(model, modifier, output_dir=tmp_path / "out", formats="gptq")


def test_folders_that_hold_files(model, no_run, tmp_path, capsys):
    kept = tmp_path / "out-compressed-tensors"
    kept.mkdir()
    (kept / "config.json").write_text("{}")
    arguments = ["--scheme", "W4A16G32", *RTN, "--format", "gptq", "-o", str(tmp_path / "out")]
    assert main(["quantize", model, *arguments, "--overwrite"]) == REFUSED
    assert "perhaps of an earlier run" in capsys.readouterr().err
    with pytest.raises(OutputExistsError, match="holds the model"):
        oneshot(model, "w4a16_autoround", output_dir=model, formats="gptq,awq")


# ---------------------------------------------------------------------- failures


@pytest.fixture
def full_disk(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(written_files, "save_file", fail)


def test_a_failed_export_keeps_the_checkpoint(model, full_disk, tmp_path, capsys, monkeypatch):
    output, kept = tmp_path / "out", tmp_path / "out-compressed-tensors"
    arguments = ["--scheme", "W4A16G32", *RTN, "--format", "gptq", "-o", str(output)]
    assert main(["quantize", model, *arguments]) == FAILED
    shown = capsys.readouterr().err
    assert "gptq: no space left on device" in shown
    assert "nothing is kept" not in shown
    (command,) = (line.strip() for line in shown.splitlines() if line.startswith("  autoround"))
    assert command == f"autoround-modifier export {kept} gptq {output}"
    assert names(tmp_path) == ["out-compressed-tensors"]
    monkeypatch.undo()
    assert main(command.split()[1:]) == DONE
    assert method_of(output) == "gptq"


def test_the_other_formats_are_made(model, tmp_path, monkeypatch):
    write = written_files.save_file

    def fail_once(*args, **kwargs):
        monkeypatch.setattr(written_files, "save_file", write)
        raise OSError("no space left on device")

    monkeypatch.setattr(written_files, "save_file", fail_once)
    modifier = AutoRoundModifier(
        config_groups={"group_0": weight_scheme(4, True, 32)}, ignore=["lm_head"], preset="rtn"
    )
    with pytest.raises(FailedError, match=r"(?s)gptq: no space left.*export .* gptq") as failed:
        oneshot(model, modifier, output_dir=tmp_path / "out", formats="gptq,awq")
    assert "awq" not in str(failed.value)
    assert names(tmp_path / "out") == ["awq", "compressed-tensors"]


def test_an_interrupted_export(model, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(written_files, "save_file", stop)
    arguments = ["--scheme", "W4A16G32", *RTN, "--format", "gptq,awq", "-o", str(tmp_path / "out")]
    assert main(["quantize", model, *arguments]) == FAILED
    shown = capsys.readouterr().err
    assert "gptq: interrupted" in shown
    assert shown.count("  autoround-modifier export") == 2
    assert names(tmp_path / "out") == ["compressed-tensors"]
