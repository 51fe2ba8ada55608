"""The model card: front matter, sections, and what is left out for want of data."""

from __future__ import annotations

import ast
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import sample_reports
import yaml
from huggingface_hub import ModelCard
from sample_reports import CONFIG, write_checkpoint

from autoround_modifier.cli.main import main
from autoround_modifier.report.card import Card, CardOptions, make_card
from autoround_modifier.report.results_table import result_rows
from autoround_modifier.report.saved_schemes import saved_schemes
from autoround_modifier.report.schema import ModelRecord, TaskResult


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "SmolLM2-135M-quantized.w2a16"
    return write_checkpoint(folder, sample_reports.report(), sample_reports.evaluation())


def made(folder: Path, **options: Any) -> Card:
    return make_card(folder, CardOptions(**options))


def headings(card: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", card, flags=re.DOTALL), re.MULTILINE)


def left_out(card: Card) -> list[str]:
    return [name for name, _ in card.left_out]


def test_the_front_matter_is_that_of_a_release(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text(made(checkpoint, language=("en",), license="apache-2.0").text)
    assert ModelCard.load(path).data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "quantized",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["llmcompressor", "quantized", "INT2", "compressed-tensors", "vllm"],
    }


def test_sections_are_filled_in_from_the_files(checkpoint: Path) -> None:
    card = made(checkpoint, repo="me/SmolLM2-135M-quantized.w2a16")
    assert headings(card.text) == [
        "SmolLM2-135M-quantized.w2a16",
        "Model overview",
        "Model optimizations",
        "Deployment",
        "Creation",
        "Evaluation",
        "Accuracy",
        "Reproduction",
    ]
    for text in (
        "`LlamaForCausalLM`, 135 M parameters",
        "[HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M)",
        "The checkpoint has 86.6 MB instead of 269 MB: 68 % less on disk",
        "| `Linear` | INT2, symmetric, groups of 64 | 16 bits |",
        "https://arxiv.org/abs/2309.05516",
        "https://arxiv.org/abs/2512.04746",
        "vllm serve me/SmolLM2-135M-quantized.w2a16\n",
        "```bash\nautoround-modifier quantize HuggingFaceTB/SmolLM2-135M ",
        "--dataset 'my text.jsonl'",
        sample_reports.RECIPE,
        "lm_eval --model hf",
        "| Same top token | 100 % | 44.8 % |",
        "| OpenLLM v1 | arc_challenge (acc_norm, 25-shot) | 0.2901 | 0.2457 | 84.7 % |",
        "| OpenLLM v1 | **Average** | 0.1527 | 0.1282 | 84.0 % |",
        "| llmcompressor | 0.14.0.1 |",
    ):
        assert text in card.text
    assert left_out(card) == ["license", "language"]


def test_the_script_is_python_that_runs_the_recipe(checkpoint: Path) -> None:
    script = re.search(r"```python\n(.*?)```", made(checkpoint).text, re.DOTALL)
    assert script is not None
    call = ast.parse(script[1]).body[1].value  # type: ignore[attr-defined]
    assert {x.arg: ast.literal_eval(x.value) for x in call.keywords} == {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "model_revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        "recipe": "recipe.yaml",
        "dataset": "my text.jsonl",
        "num_calibration_samples": 128,
        "max_seq_length": 2048,
        "output_dir": "SmolLM2-135M-quantized.w2a16",
    }


def test_nothing_is_invented(tmp_path: Path) -> None:
    report = sample_reports.report(
        command=None,
        size=None,
        data=sample_reports.report().data.model_copy(update={"source": None}),
        model=ModelRecord(source="models/tiny", architecture="XModel", parameters=12),
    )
    card = made(write_checkpoint(tmp_path, report, None, {"architectures": ["XModel"]}))
    assert headings(card.text)[1:] == [
        "Model overview",
        "Model optimizations",
        "Creation",
        "Reproduction",
    ]
    assert left_out(card) == [
        "base_model",
        "license",
        "language",
        "pipeline_tag",
        "size",
        "schemes",
        "deployment",
        "command",
        "script",
        "evaluation",
        "accuracy",
    ]
    for text in ("vllm", "huggingface.co", "License", "instead of", "oneshot", "None", "less on"):
        assert text not in card.text
    assert yaml.safe_load(card.text.split("---")[1]) == {
        "library_name": "transformers",
        "tags": ["quantized"],
    }


def test_divergence_without_tasks_has_no_accuracy(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, sample_reports.report(), sample_reports.evaluation(tasks=[])
    )
    card = made(folder)
    assert ("accuracy", "no tasks were evaluated") in card.left_out
    assert "Evaluation" in headings(card.text)
    assert "Accuracy" not in headings(card.text)


def test_license_and_language_come_from_the_card_of_the_original(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    (original / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-license\nlicense_link: LICENSE\n"
        "language:\n- en\n- fr\n---\n# Original\n"
    )
    model = ModelRecord(source=str(original), architecture="LlamaForCausalLM", parameters=12)
    card = made(write_checkpoint(tmp_path / "model", sample_reports.report(model=model)))
    front = yaml.safe_load(card.text.split("---")[1])
    assert front["license"] == "other"
    assert front["license_name"] == "my-license"
    assert front["language"] == ["en", "fr"]
    assert "base_model" not in front


def test_a_folder_of_the_hub_cache_names_the_original(tmp_path: Path) -> None:
    model = ModelRecord(
        source="/cache/models--owner--name/snapshots/abc", architecture="X", parameters=1
    )
    card = made(write_checkpoint(tmp_path, sample_reports.report(model=model)))
    assert yaml.safe_load(card.text.split("---")[1])["base_model"] == "owner/name"
    assert 'model="owner/name"' in card.text


def config_with(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> Any:
    config = deepcopy(CONFIG)
    group = config["quantization_config"]["config_groups"]["group_0"]
    group |= {"weights": weights, "input_activations": inputs, "format": form}
    return config


@pytest.mark.parametrize(
    ("weights", "inputs", "form", "expected"),
    [
        (
            {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"},
            None,
            "pack-quantized",
            ("INT4, asymmetric, one scale for each output channel", "16 bits", "INT4", None),
        ),
        (
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            {"num_bits": 8, "type": "float", "dynamic": True},
            "float-quantized",
            ("FP8, blocks of 128 x 128", "FP8, dynamic", "FP8", "FP8"),
        ),
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            {"num_bits": 4, "type": "float", "dynamic": "local"},
            "nvfp4-pack-quantized",
            (
                "NVFP4, groups of 16",
                "NVFP4, dynamic, with a static global scale",
                "NVFP4",
                "NVFP4",
            ),
        ),
        (
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
            None,
            "mxfp4-pack-quantized",
            ("MXFP4, groups of 32", "16 bits", "MXFP4", None),
        ),
    ],
)
def test_schemes_are_named_as_releases_name_them(
    weights: dict[str, Any], inputs: Any, form: str, expected: tuple[Any, ...]
) -> None:
    (saved,) = saved_schemes(config_with(weights, inputs, form))
    scheme = saved.scheme
    found = (scheme.weights, scheme.activations, scheme.weight_tag, scheme.activation_tag)
    assert found == expected


def test_code_and_tables_hold_whatever_they_are_given(tmp_path: Path) -> None:
    recipe = sample_reports.RECIPE + "# ```\n"
    report = sample_reports.report(recipe=recipe, device="a | b <script>")
    card = made(write_checkpoint(tmp_path, report)).text
    assert f"````yaml\n{recipe}````" in card
    assert "a \\| b &lt;script&gt;" in card


def test_averages_are_of_whole_categories() -> None:
    def result(task: str, metric: str = "acc", original: float | None = 0.5) -> TaskResult:
        return TaskResult(task=task, metric=metric, original=original, quantized=0.4)

    both = [result("mmlu"), result("hellaswag")]
    assert [x.benchmark for x in result_rows(both)] == [
        "mmlu (acc)",
        "hellaswag (acc)",
        "**Average**",
    ]
    for extra in (result("mmlu", "acc_norm"), result("gsm8k", original=None)):
        assert all("Average" not in x.benchmark for x in result_rows([*both, extra]))
    part = result("mmlu_anatomy").model_copy(update={"group": "mmlu"})
    assert len(result_rows([*both, part])) == 3
    (row,) = result_rows([result("wikitext", "word_perplexity")])
    assert (row.category, row.recovery) == ("Others", "")


def test_the_command_writes_the_card_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "model", sample_reports.report())
    assert main(["card", str(folder), "--language", "en", "--license", "mit"]) == 0
    output = capsys.readouterr()
    assert output.out.strip() == str(folder / "README.md")
    assert output.err.splitlines() == [
        "left out: evaluation (`autoround-modifier evaluate` was not run on it)",
        "left out: accuracy (`autoround-modifier evaluate` was not run on it)",
    ]
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert main(["card", str(folder)]) == 0  # its own card may be written again


def test_a_card_of_somebody_else_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path, sample_reports.report())
    (folder / "README.md").write_text("# Mine\n")
    assert main(["card", str(folder)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert main(["card", str(folder), "--overwrite"]) == 0
    assert "Model overview" in (folder / "README.md").read_text()


@pytest.mark.parametrize("config", [None, "[]", "{"])
def test_a_configuration_that_cannot_be_read_is_refused(
    tmp_path: Path, config: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path, sample_reports.report(), config=None)
    if config is not None:
        (folder / "config.json").write_text(config)
    assert main(["card", str(folder)]) == 1
    assert "config.json" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_without_a_report_there_is_no_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(tmp_path)]) == 1
    assert "autoround-modifier quantize" in capsys.readouterr().err
