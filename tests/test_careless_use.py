"""What careless users give to the command line: refused in words, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import tiny_llama, tiny_tokenizer
from test_quantize_command import FAST
from transformers import OPTConfig, OPTForCausalLM, T5Config

from autoround_modifier import job as job_module
from autoround_modifier.cli.main import main
from autoround_modifier.cli.outcome import DONE, FAILED, REFUSED, USAGE
from autoround_modifier.errors import CheckpointError
from autoround_modifier.evaluation import results
from autoround_modifier.host.saving import written_at_once
from autoround_modifier.release.finished_steps import FinishedSteps
from autoround_modifier.report.schema import read_report
from autoround_modifier.runs.files import check_writable, write_atomically

WORDS = " ".join(f"w{number}" for number in range(3, 128))
SCHEME = ("--scheme", "W4A16G32")


@pytest.fixture
def folder() -> str:
    return tiny_llama().config._name_or_path


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text(f"{json.dumps({'text': WORDS})}\n" * 6)
    return str(path)


@pytest.fixture
def opt(tmp_path) -> str:
    """:return: a model with learned positions, for 32 tokens"""
    path = tmp_path / "opt"
    config = OPTConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=64,
    )
    OPTForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def recipe_file(tmp_path, **modifiers) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}))
    return str(path)


def weights(targets, num_bits, **more):
    group = {"num_bits": num_bits, "strategy": "group", "group_size": 32}
    return {"config_groups": {"g": {"targets": targets, "weights": group}}, **more}


# ---------------------------------------------------------------------- files that are none


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "MODEL", "--recipe", "FILE", "--dry-run"),
        ("plan", "MODEL", "--recipe", "FILE"),
        ("recipes", "show", "FILE"),
        ("recipes", "new", "new.yaml", "--from", "FILE"),
        ("release", "FILE"),
        ("evaluate", "MODEL", "MODEL", "--prompts", "FILE", "--no-divergence", "--no-save"),
    ],
    ids=" ".join,
)
def test_bytes_are_no_text(folder, command, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_bytes(b"a\xaa\xff\n")
    given = {"MODEL": folder, "FILE": str(path)}
    assert main([given.get(word, word) for word in command]) == REFUSED
    assert "not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not valid JSON"),
        ('{"model_type": "llama", "quantization_config": 5}', "`quantization_config` is no JSON"),
        (
            '{"model_type": "llama", "quantization_config": {"config_groups": {"g": 3}}}',
            "`g` of `config_groups` is no JSON object",
        ),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("quantize", *SCHEME, "--dry-run"),
        ("plan",),
        ("inspect", "--json"),
        ("push", "a/b"),
    ],
    ids=" ".join,
)
def test_torn_configs(folder, content, said, command, tmp_path, capsys):
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    (copied / "config.json").write_text(content)
    assert main([command[0], str(copied), *command[1:]]) == REFUSED
    shown = capsys.readouterr()
    assert said in shown.err or "cannot be read" in shown.err
    assert not shown.out


def test_steps_that_are_none(tmp_path):
    path = tmp_path / "steps.json"
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        FinishedSteps(path)


# ---------------------------------------------------------------------- flags and recipes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "gibberish"], "no file or folder `gibberish`"),
        (["--dataset", ""], "no file or folder ``"),
        (["--dataset", "nothing.jsonl"], "no file or folder `nothing.jsonl`"),
        (["--targets", "re:["], "`re:[` is no regular expression"),
        (["--ignore", "re:("], "`re:(` is no regular expression"),
        (["--seed", "99999999999999999999"], "seed"),
        (["--nsamples", "0"], "`AutoRoundModifier`: Value error, iters is 200"),
    ],
)
def test_refused_before_weights_are_loaded(folder, arguments, said, capsys):
    assert main(["quantize", folder, *SCHEME, *arguments, "--dry-run"]) == REFUSED
    assert said in capsys.readouterr().err


def test_a_device_map_that_is_none(folder, tmp_path, capsys):
    command = ["quantize", folder, *SCHEME, "--device-map", "nonsense", "-o", str(tmp_path / "x")]
    assert main(command) == REFUSED
    assert "--device-map" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["out", "out/blocks"])
def test_finished_blocks_stay_out_of_the_checkpoint(folder, text, kept, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["quantize", folder, *SCHEME, "--dataset", text, "-o", str(output)]
    assert main([*command, "--checkpoint-dir", str(tmp_path / kept)]) == REFUSED
    assert "choose a folder beside it" in capsys.readouterr().err
    assert not output.exists()


def test_a_folder_of_data_needs_no_slash(folder, text, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    shutil.move(text, data)
    monkeypatch.chdir(tmp_path)
    command = ["quantize", folder, *SCHEME, "--iters", "1", *FAST, "--dataset", "data", "-o", "out"]
    assert main(command) == DONE
    assert read_report(tmp_path / "out").data.source == "data"


def test_a_recipe_without_autoround(folder, tmp_path, capsys):
    recipe = recipe_file(tmp_path, SmoothQuantModifier={"smoothing_strength": 0.5})
    output = tmp_path / "out"
    assert main(["quantize", folder, "--recipe", recipe, "-o", str(output)]) == REFUSED
    assert "no AutoRoundModifier, only SmoothQuantModifier" in capsys.readouterr().err
    assert not output.exists()


def test_layers_are_not_quantized_twice(folder, text, tmp_path, capsys):
    recipe = recipe_file(
        tmp_path,
        GPTQModifier=weights(["Linear"], 8, ignore=["lm_head"]),
        AutoRoundModifier=weights(["Linear"], 4, ignore=["lm_head"], iters=1, batch_size=2),
    )
    output = tmp_path / "out"
    command = ["quantize", folder, "--recipe", recipe, "--dataset", text, "-o", str(output)]
    assert main([*command, "--max-seq-length", "12"]) == REFUSED
    assert "another modifier of the recipe quantizes the same layers" in capsys.readouterr().err
    assert not output.exists()


def test_recipes_of_other_modifiers_are_plain_yaml(folder, text, tmp_path):
    """SmoothQuant finds its mappings as named tuples."""
    recipe = recipe_file(
        tmp_path,
        SmoothQuantModifier={"smoothing_strength": 0.5},
        AutoRoundModifier=weights(["Linear"], 4, ignore=["lm_head"], iters=1, batch_size=2),
    )
    output = tmp_path / "out"
    command = ["quantize", folder, "--recipe", recipe, "--dataset", text, "-o", str(output)]
    assert main([*command, "--max-seq-length", "12"]) == DONE
    (group,) = yaml.safe_load((output / "recipe.yaml").read_text())["quant_stage"].values()
    assert group["SmoothQuantModifier"]["mappings"][0][1] == "re:.*input_layernorm"
    assert main(["card", str(output)]) == DONE


@pytest.mark.parametrize("command", ["quantize", "release"])
def test_quiet_and_verbose(folder, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    more = SCHEME if command == "quantize" else ()
    assert main([command, folder, *more, "--dry-run", "-q", "-v"]) == USAGE
    assert "exclude each other" in capsys.readouterr().err


def test_a_dry_run_in_json(folder, capsys):
    assert main(["quantize", folder, *SCHEME, "--dry-run", "--json"]) == DONE
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert "AutoRoundModifier" in recipe


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("dataset", [True, False])
def test_samples_are_not_longer_than_the_model_can_read(opt, text, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    data = ["--dataset", text] if dataset else []
    command = ["quantize", opt, *SCHEME, "--iters", "1", "--nsamples", "2", "--batch-size", "2"]
    assert main([*command, *data, "-o", str(output)]) == DONE
    assert "samples have 32 tokens" in capsys.readouterr().err
    assert read_report(output).data.max_length <= 32
    assert main(["evaluate", opt, str(output), "--no-generations", "--samples", "2"]) == DONE


# ---------------------------------------------------------------------- evaluations


def test_models_are_looked_at_before_one_is_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("autoround_modifier.evaluation.run.load", None)
    T5Config(num_layers=1).save_pretrained(tmp_path)
    assert main(["evaluate", folder, str(tmp_path), "--no-save"]) == REFUSED
    assert "no language model of the type `t5`" in capsys.readouterr().err
    assert main(["evaluate", folder, "nobody/nothing", "--no-save"]) == REFUSED
    assert "nobody/nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--dtype", "int3"], "--dtype"), (["--max-new-tokens", "0"], "--max-new-tokens")],
)
def test_usage(folder, arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["evaluate", folder, folder, "--no-save", *arguments]) == USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [True, False])
def test_results_are_shown_although_they_cannot_be_saved(
    folder, text, as_json, tmp_path, capsys, monkeypatch
):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(results, "write_atomically", full)
    command = ["evaluate", folder, folder, "--no-generations", "--text", text, "--length", "12"]
    file = ["--output", str(tmp_path / "evaluation.json")]
    assert main([*command, *file, *(["--json"] if as_json else [])]) == REFUSED
    shown = capsys.readouterr()
    assert "No space left on device" in shown.err
    if as_json:
        assert json.loads(shown.out)["divergence"]["kl"] == 0
    else:
        assert "KL divergence" in shown.out


def test_devices_are_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, *map(type(tmp_path), ("/dev/null", "/dev/stdout", "/dev/new"))):
        for write in (check_writable, lambda x: write_atomically(x, "text")):
            with pytest.raises(OSError, match="is a device or a pipe"):
                write(path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "new" / "folder" / "file")
    assert not (tmp_path / "new").exists()


def with_own_code(folder: str, copied) -> str:
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "own.py").write_text("raise SystemExit('this ran')")
    return str(copied)


def test_nobody_is_asked_on_the_terminal_to_trust_code(folder, tmp_path, capsys, monkeypatch):
    def asked(*args):
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    own = with_own_code(folder, tmp_path / "own")
    assert main(["inspect", own]) == DONE
    assert "not checked for Transformers" in capsys.readouterr().err
    assert main(["evaluate", folder, own, "--no-save"]) == REFUSED
    assert "--trust-remote-code" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "quantize", "quantize on data"])
def test_no_tokenizer(folder, text, command, tmp_path, capsys):
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    for path in copied.glob("tokenizer*"):
        path.unlink()
    more = {
        "evaluate": ["evaluate", str(copied), folder, "--no-save"],
        "quantize": ["quantize", str(copied), *SCHEME, "-o", str(tmp_path / "out")],
    }
    data = ["--dataset", text] if command.endswith("data") else []
    assert main([*more[command.split()[0]], *data]) == REFUSED
    assert f"the tokenizer of {copied} cannot be loaded" in capsys.readouterr().err


def test_an_interrupted_release(folder, text, tmp_path, capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    path = tmp_path / "release.yaml"
    entry = {"name": "tiny", "scheme": "W4A16G32"}
    path.write_text(yaml.safe_dump({"model": folder, "output": "out", "checkpoints": [entry]}))
    monkeypatch.setattr(job_module.QuantizationJob, "_loaded", interrupted)
    assert main(["release", str(path)]) == FAILED
    shown = capsys.readouterr().err
    assert "failed: tiny: interrupted" in shown
    assert "Traceback" not in shown


def test_what_another_process_saves_is_left_alone(tmp_path):
    """Two runs that save into one folder at the same time."""
    with written_at_once(tmp_path) as first, written_at_once(tmp_path) as second:
        assert first.path.is_dir()
        for one in (first, second):
            (one.path / "config.json").write_text("{}")
            one.complete = True
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    killed = tmp_path / ".unfinished-killed"
    killed.mkdir()
    with written_at_once(tmp_path):
        assert not killed.exists()


# ---------------------------------------------------------------------- reports


@pytest.mark.parametrize("command", ["report", "card"])
def test_a_report_is_asked_for_by_its_folder(command, tmp_path, capsys):
    file = tmp_path / "quantization_report.json"
    file.write_text("{}")
    assert main([command, str(file)]) == REFUSED
    assert "name the folder of the checkpoint" in capsys.readouterr().err
    assert main([command, str(tmp_path)]) == REFUSED
    shown = capsys.readouterr().err
    assert "versions: Field required" in shown
    assert "errors.pydantic.dev" not in shown


# ---------------------------------------------------------------------- other processes


def in_a_process(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "autoround_modifier", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_leaves():
    reading, writing = os.pipe()
    os.close(reading)
    process = in_a_process("recipes", "show", "w4a16_autoround", stdout=writing)
    os.close(writing)
    assert process.communicate()[1] == ""
    assert process.returncode == REFUSED


def test_libraries_say_nothing(folder):
    process = in_a_process("inspect", folder, "--json", stdout=subprocess.PIPE)
    shown, said = process.communicate()
    assert process.returncode == DONE
    assert said == ""
    json.loads(shown)


# ---------------------------------------------------------------------- signals


def test_sigterm_is_like_ctrl_c(folder, tmp_path, capsys, monkeypatch):
    def terminated(self):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(job_module.QuantizationJob, "_loaded", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["quantize", folder, *SCHEME, "-o", str(tmp_path / "out")]) == FAILED
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
