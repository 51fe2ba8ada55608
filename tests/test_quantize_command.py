"""`quantize`: flags to recipes, refusals, runs that end and runs that stop."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import tiny_llama

from autoround_modifier import AutoRoundModifier, AutoSchemeModifier, ScaleDistillationModifier
from autoround_modifier.cli.main import main
from autoround_modifier.cli.outcome import DONE, FAILED, REFUSED, USAGE
from autoround_modifier.cli.quantize import SHARED
from autoround_modifier.report.card import MARK as CARD_MARK
from autoround_modifier.report.page import MARK as PAGE_MARK
from autoround_modifier.report.schema import read_report
from autoround_modifier.runs.checkpoint import RunCheckpoint

FAST = ["--batch-size", "2", "--nsamples", "4", "--seqlen", "12"]


@pytest.fixture
def folder():
    # wide enough for groups and blocks of 128
    return tiny_llama(hidden_size=256).config._name_or_path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(f"t{(i * j) % 90}" for j in range(40))} for i in range(1, 9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def dry_run(*arguments, capsys):
    """:return: modifiers of the recipe that a command line stands for, by name"""
    assert main(["quantize", *arguments, "--dry-run"]) == DONE
    recipe = yaml.safe_load(capsys.readouterr().out)
    return recipe["quant_stage"]["quant_modifiers"]


# ---------------------------------------------------------------------- flags


def test_a_scheme(folder, capsys):
    assert dry_run(folder, "--scheme", "W4A16", capsys=capsys) == {
        "AutoRoundModifier": {"ignore": ["lm_head"], "scheme": "W4A16"}
    }


def test_a_scheme_with_a_group_size(folder, capsys):
    (body,) = dry_run(folder, "--scheme", "W2A16G32", "--iters", "5", capsys=capsys).values()
    weights = body["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (2, 32, True)
    assert body["iters"] == 5


@pytest.mark.parametrize("flag", ["--disable-opt-rtn", "--disable_opt_rtn"])
def test_rounding_to_nearest_as_auto_round_spells_it(folder, flag, capsys):
    (body,) = dry_run(folder, "--scheme", "FP8_BLOCK", "--iters", "0", flag, capsys=capsys).values()
    modifier = AutoRoundModifier(**body)
    assert (modifier.iters, modifier.scale_search) == (0, False)
    assert not modifier.requires_calibration_data


def test_iters_0_searches_scales(folder, capsys):
    (body,) = dry_run(folder, "--scheme", "W4A16", "--iters", "0", capsys=capsys).values()
    assert AutoRoundModifier(**body).scale_search


def test_bits_and_options(folder, capsys):
    found = dry_run(
        folder,
        *("--bits", "3.5", "--options", "W2A16G32,W4A16G32", "--options", "W8A16"),
        *("--engine", "vllm", "--seed", "3", "--auto-scheme-batch-size", "1"),
        capsys=capsys,
    )
    assert list(found) == ["AutoSchemeModifier", "AutoRoundModifier"]
    scheme = AutoSchemeModifier(**found["AutoSchemeModifier"])
    assert scheme.options == ["W2A16G32", "W4A16G32", "W8A16"]
    assert (scheme.avg_bits, scheme.engine, scheme.seed, scheme.batch_size) == (3.5, "vllm", 3, 1)
    assert found["AutoRoundModifier"] == {"ignore": ["lm_head"], "engine": "vllm", "seed": 3}


def test_distillation(folder, capsys):
    found = dry_run(folder, "--scheme", "W4A16", "--distill-iters", "7", capsys=capsys)
    assert list(found) == ["AutoRoundModifier", "ScaleDistillationModifier"]
    assert found["ScaleDistillationModifier"] == {"iters": 7}
    found = dry_run(folder, "--recipe", "w2a16_distilled_autoround", "--distill", capsys=capsys)
    assert found["ScaleDistillationModifier"]["iters"] == 50


def test_fields_of_a_recipe_are_replaced(folder, capsys):
    (body,) = dry_run(
        folder,
        *("--recipe", "w2a16_autoround", "--preset", "light", "--no-enable-minmax-tuning"),
        *("--set", "AutoRoundModifier.config_groups.group_0.weights.group_size=32"),
        *("--set", "quant_stage.quant_modifiers.AutoRoundModifier.mtp=drop"),
        capsys=capsys,
    ).values()
    assert body["config_groups"]["group_0"]["weights"]["group_size"] == 32
    modifier = AutoRoundModifier(**body)
    assert (modifier.iters, modifier.mtp, modifier.enable_minmax_tuning) == (50, "drop", False)


@pytest.mark.parametrize(
    ("modifier", "prefix", "without"),
    [
        (AutoRoundModifier, "", set()),
        (AutoSchemeModifier, "auto-scheme-", SHARED | {"avg_bits", "options"}),
        (ScaleDistillationModifier, "distill-", {"seed"}),
    ],
)
def test_every_field_is_a_flag(modifier, prefix, without, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    main(["quantize", "--help"])
    shown = capsys.readouterr().out
    described = {name for name, field in modifier.model_fields.items() if field.description}
    assert len(described) > 5
    missing = [x for x in described - without if f"--{prefix}{x.replace('_', '-')}" not in shown]
    assert not missing


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--recipe"),
        (["--bits", "2.5"], "--options missing"),
        (["--recipe", "w4a16_autoround", "--scheme", "W4A16"], "--scheme and --config-groups too"),
        (["--scheme", "W4A16", "--bits", "3", "--options", "W2A16,W4A16"], "--bits chooses"),
        (["--scheme", "W4A16", "--iters", "3", "--disable-opt-rtn"], "--iters 0"),
        (["--scheme", "W4A16", "--kv-cache-scheme", "{"], "--kv-cache-scheme"),
    ],
)
def test_usage(folder, arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["quantize", folder, *arguments, "--dry-run"]) == USAGE
    assert said in capsys.readouterr().err


def test_what_shapes_rule_out_is_refused_before_weights_are_loaded(capsys):
    narrow = tiny_llama().config._name_or_path
    assert main(["quantize", narrow, "--scheme", "W4A16", "--dry-run"]) == REFUSED
    shown = capsys.readouterr().err
    assert "64 input features, group_size 128; 64, 32, 16 would divide" in shown
    budget = ["--bits", "9", "--options", "W2A16G32,W4A16G32,UNQUANTIZED"]
    assert main(["quantize", narrow, *budget, "--dry-run"]) == DONE
    budget[1] = "1"
    assert main(["quantize", narrow, *budget, "--dry-run"]) == REFUSED
    assert "avg_bits is 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "W17"], "unknown scheme `W17`"),
        (["--recipe", "w5"], "no shipped recipe of that name"),
        (["--recipe", "w4a16_autoroud"], "did you mean `w4a16_autoround`"),
        (["--scheme", "W4A16", "--iters", "-1"], "iters"),
        (["--scheme", "W4A16", "--set", "AutoRoundModifier.itres=3"], "did you mean `iters`"),
        (["--scheme", "W4A16", "--set", "Nothing.iters=3"], "there is no `Nothing`"),
        (["--scheme", "W4A16", "--set", "iters=3"], "Modifier.field=value"),
    ],
)
def test_wrong_recipes_are_refused(folder, arguments, said, capsys):
    assert main(["quantize", folder, *arguments, "--dry-run"]) == REFUSED
    assert said in capsys.readouterr().err


def test_models_and_folders_are_refused(folder, tmp_path, capsys):
    scheme = ["--scheme", "W4A16"]
    assert main(["quantize", str(tmp_path), *scheme, "--dry-run"]) == REFUSED
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert main(["quantize", str(tmp_path), *scheme, "--dry-run"]) == REFUSED
    assert "compressed already" in capsys.readouterr().err
    assert main(["quantize", folder, *scheme, "-o", str(tmp_path)]) == REFUSED
    assert "--overwrite" in capsys.readouterr().err


# ---------------------------------------------------------------------- runs


def test_a_run_leaves_a_checkpoint_with_a_report(folder, text, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--scheme", "W2A16G32", "--iters", "2", "--dataset", text, *FAST]
    assert main(["quantize", folder, *arguments, "-o", str(output), "--json"]) == DONE
    shown = capsys.readouterr()
    assert "[2/2] model.layers.1: held-out loss" in shown.err
    report = read_report(output)
    assert json.loads(shown.out) == {
        "output": str(output),
        "formats": {"compressed-tensors": str(output)},
        "report": report.model_dump(mode="json"),
    }
    assert report.model.source == folder
    assert report.data.source == text
    assert (report.data.samples, report.data.max_length) == (4, 12)
    assert len(report.blocks) == 2
    assert len(report.layers) == 14
    assert {layer.scheme for layer in report.layers} == {"W2A16 G32"}


def test_what_was_said_of_an_overwritten_checkpoint_goes(folder, tmp_path):
    output = tmp_path / "out"
    arguments = ["--scheme", "W4A16G32", "--preset", "rtn", "-o", str(output), "--quiet"]
    assert main(["quantize", folder, *arguments]) == DONE
    modes = {path.stat().st_mode for path in output.iterdir()}
    assert len(modes) == 1  # safetensors would let the owner alone read the weights
    (output / "evaluation.json").write_text("{}")
    (output / "README.md").write_text("mine")
    (output / "quantization_report.html").write_text(PAGE_MARK)
    assert main(["quantize", folder, *arguments, "--overwrite"]) == DONE
    names = {path.name for path in output.iterdir()}
    assert not {"evaluation.json", "quantization_report.html"} & names
    assert (output / "README.md").read_text() == "mine"
    (output / "README.md").write_text(f"{CARD_MARK} of other weights")
    assert main(["quantize", folder, *arguments, "--overwrite"]) == DONE
    assert not (output / "README.md").exists()


def test_the_model_writes_its_own_text(folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--scheme", "W4A16G32", "--iters", "0", *FAST, "--quiet"]
    assert main(["quantize", folder, *arguments, "-o", str(output)]) == DONE
    shown = capsys.readouterr()
    assert "saving" not in shown.err
    assert f"saved in {output}" in shown.out
    assert read_report(output).data.source == "self-generated"


def test_a_run_that_stops_says_how_to_go_on(folder, text, tmp_path, capsys, monkeypatch):
    output, kept = tmp_path / "out", tmp_path / "blocks"
    arguments = ["--scheme", "W4A16G32", "--iters", "2", "--dataset", text, *FAST]
    save = RunCheckpoint.save

    def stop_after_the_first(self, index, *args):
        save(self, index, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunCheckpoint, "save", stop_after_the_first)
    command = ["quantize", folder, *arguments, "-o", str(output), "--checkpoint-dir", str(kept)]
    assert main(command) == FAILED
    assert f"finished blocks are kept in {kept}" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.undo()
    assert main(command) == DONE
    assert "found finished" in capsys.readouterr().err
