"""Two models compared by `evaluate`: on a text, in what they write, on tasks of a folder."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from conftest import VOCABULARY, quantize, tiny_llama, tiny_tokenizer, weight_scheme
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from autoround_modifier import AutoRoundModifier, EvaluationError, evaluate, load
from autoround_modifier.cli.main import main
from autoround_modifier.evaluation.generations import read_prompts
from autoround_modifier.evaluation.results import merge_evaluations
from autoround_modifier.evaluation.results_files import read_results
from autoround_modifier.evaluation.task_results import task_results
from autoround_modifier.evaluation.tasks import Harness, TaskSettings
from autoround_modifier.evaluation.text import check_not_calibrated_on, read_text
from autoround_modifier.evaluation.tokens import token_texts
from autoround_modifier.report.schema import (
    DataRecord,
    Evaluation,
    Generation,
    TaskResult,
    read_evaluation,
)
from autoround_modifier.runs.calibration_data import calibration_digest

CHAT_TEMPLATE = "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a tiny model and of what it was quantized to."""
    folder = tmp_path_factory.mktemp("pair")
    original, quantized = folder / "original", folder / "quantized"
    tiny_llama().save_pretrained(original)
    tiny_tokenizer().save_pretrained(original)
    recipe = AutoRoundModifier(
        preset="rtn", config_groups={"group_0": weight_scheme(4)}, ignore=["lm_head"]
    )
    quantize(tiny_llama(), recipe, output_dir=str(quantized))
    return original, quantized


@pytest.fixture
def models_(pair, tmp_path) -> tuple[Path, Path]:
    """The same, with a folder of its own to write to."""
    return pair[0], shutil.copytree(pair[1], tmp_path / "quantized")


@pytest.fixture
def text(tmp_path) -> Path:
    """160 words in two documents, of which one is for evaluation."""
    path = tmp_path / "text.jsonl"
    generator = torch.Generator().manual_seed(3)
    rows = [
        {
            "text": " ".join(f"w{i}" for i in torch.randint(3, 128, (80,), generator=generator)),
            "split": split,
        }
        for split in ("calib", "eval")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def task_folder(tmp_path, monkeypatch) -> Path:
    """Two multiple-choice tasks and their group, as lm-evaluation-harness reads them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"w{10 + i} w{20 + i}", "choices": ["w30", "w40"], "answer": i % 2}
        for i in range(12)
    ]
    data = folder / "words.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, shots in (("tiny_words", 0), ("tiny_words_shots", 2)):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}\n"
            "test_split: test\n"
            "fewshot_split: test\n"
            "output_type: multiple_choice\n"
            "doc_to_text: '{{question}}'\n"
            "doc_to_choice: '{{choices}}'\n"
            "doc_to_target: answer\n"
            f"num_fewshot: {shots}\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
            "metadata: {version: 1.0}\n"
        )
    (folder / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_words, tiny_words_shots]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
        "metadata: {version: 1.0}\n"
    )
    return folder


def run(models_, *arguments: object) -> int:
    return main(["evaluate", *map(str, models_), *map(str, arguments)])


def test_text_and_generations(models_, text, capsys):
    arguments = ("--text", text, "--match", "split=eval", "--length", 16, "--max-new-tokens", 4)
    assert run(models_, *arguments, "--json") == 0
    printed = Evaluation.model_validate_json(capsys.readouterr().out)
    assert printed == read_evaluation(models_[1])

    ids = [int(word[1:]) for word in json.loads(text.read_text().splitlines()[1])["text"].split()]
    samples = torch.tensor(ids).view(-1, 16)
    assert printed.text is not None
    assert (printed.text.samples, printed.text.length) == (5, 16)
    assert printed.text.digest == calibration_digest([{"input_ids": samples}])
    first, second = (AutoModelForCausalLM.from_pretrained(x, dtype="auto") for x in models_)
    expected = evaluate(first, second, samples)
    found = printed.divergence
    assert found is not None
    assert found.kl == pytest.approx(expected.kl, rel=1e-3)
    assert found.top1 == pytest.approx(expected.top1)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-3)
    assert found.original_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-3)

    tokens = printed.tokens
    assert "".join(token.text for token in tokens).split() == [f"w{i}" for i in ids[1:16]]
    mean = sum(token.kl for token in tokens) / len(tokens)
    assert mean == pytest.approx(expected.kl_per_sample[0], rel=1e-3)
    assert 0 < sum(token.same_top1 for token in tokens) < len(tokens)
    assert len(printed.generations) == 4
    assert all(len(x.original.split()) == 4 for x in printed.generations)


def test_a_quantized_model_whose_weights_stay_packed(models_, text, capsys, monkeypatch):
    loaded = []

    def spy(*arguments, **options):
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr("autoround_modifier.evaluation.run.load_packed", spy)
    arguments = ("--text", text, "--length", 16, "--max-new-tokens", 4, "--no-save", "--json")
    printed = []
    for backend in ("transformers", "torch"):
        assert run(models_, *arguments, "--backend", backend) == 0
        printed.append(Evaluation.model_validate_json(capsys.readouterr().out))
    unpacked, packed = printed
    assert packed.divergence == unpacked.divergence
    assert packed.generations == unpacked.generations
    (model,) = loaded
    assert model.model.layers[0].mlp.up_proj.weight_packed.dtype == torch.int32


def test_tables(models_, text, capsys):
    assert run(models_, "--text", text, "--length", 16, "--max-new-tokens", 4) == 0
    out = capsys.readouterr().out
    for words in ("KL divergence, nats per token", "same first choice", "why the sky is blue"):
        assert words in out
    assert f"written to {models_[1] / 'evaluation.json'}" in out


def test_generations_with_a_chat_template(models_, tmp_path, capsys):
    original = shutil.copytree(models_[0], tmp_path / "chat")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(original)
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "w7"}, {"role": "user", "content": "w8"}]
    prompts.write_text('{"prompt": "w7"}\n' + json.dumps({"messages": messages}))
    arguments = ("--no-divergence", "--prompts", prompts, "--max-new-tokens", 3, "--json")
    assert run((original, models_[1]), *arguments) == 0
    one, two = Evaluation.model_validate_json(capsys.readouterr().out).generations
    assert (one.prompt, two.prompt) == ("w7", "user: w7\nuser: w8")
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    for ids, found in (([5, 7, 6], one), ([5, 7, 6, 5, 8, 6], two)):
        written = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
        assert found.original == tokenizer.decode(written[0, len(ids) :])


def test_real_tasks(models_, task_folder, tmp_path, capsys):
    """lm-evaluation-harness itself, on data of this machine."""
    kept = tmp_path / "results"
    arguments = ("--tasks", "tiny_group", "--task-path", task_folder, "--batch-size", 4)
    switches = ("--no-divergence", "--no-generations", "--save-results", kept, "--json")
    assert run(models_, *arguments, *switches) == 0
    found = Evaluation.model_validate_json(capsys.readouterr().out)
    rows = {row.task: row for row in found.tasks}
    assert set(rows) == {"tiny_group", "tiny_words", "tiny_words_shots"}
    assert [rows[name].shots for name in ("tiny_words", "tiny_words_shots")] == [0, 2]
    assert rows["tiny_words"].group == "tiny_group"
    assert rows["tiny_group"].group is None
    for index, model in enumerate(map(_choices_right, models_)):
        shown = rows["tiny_words"].quantized if index else rows["tiny_words"].original
        assert shown == pytest.approx(model)
    assert all(row.engine == "transformers" and row.higher_is_better for row in found.tasks)
    assert "lm_eval" in found.versions
    assert [command.split()[:3] for command in found.task_commands] == [
        ["lm_eval", "--model", "hf"]
    ] * 2

    assert list((tmp_path / "cache").iterdir())

    # The files that the harness left, read as they are, give the same rows.
    folders = sorted(kept.iterdir(), key=lambda folder: folder.name.endswith("quantized"))
    files = [next(folder.glob("results_*.json")) for folder in folders]
    read = task_results(read_results(files[0]), read_results(folders[1]), "transformers")
    assert read == found.tasks
    results = ("--original-results", folders[0], "--quantized-results", files[1], "--no-save")
    assert run(models_, *results) == 0
    out = capsys.readouterr().out
    assert "tiny_group" in out
    assert "2 results of parts of groups are in the file alone" in out
    # With the original's results, the tasks run for the quantized model alone.
    assert run(models_, *arguments, "--original-results", files[0], *switches[:2], "--json") == 0
    again = Evaluation.model_validate_json(capsys.readouterr().out)
    assert again.tasks == found.tasks
    assert len(again.task_commands) == 1


def _choices_right(folder: Path) -> float:
    """:return: share of the rows of `task_folder` that a model answers rightly"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    right = 0
    for i in range(12):
        logits = model(torch.tensor([[10 + i, 20 + i]])).logits[0, -1]
        right += int(logits[40] > logits[30]) == i % 2
    return right / 12


def test_program_of_another_environment(models_, tmp_path, capsys):
    """What the program is asked for, and that what it writes is read."""
    program = tmp_path / "lm_eval"
    results = json.dumps(harness_results(lm_eval_version="0.4.99"))
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_path') + 1]) / 'someone__tiny'\n"
        "folder.mkdir()\n"
        f"(folder / 'results_2026-01-01.json').write_text({results!r})\n"
        "print(*sys.argv[1:9])\n"
    )
    program.chmod(0o755)
    arguments = ("--engine", "vllm", "--tasks", "mmlu", "--lm-eval", program, "--json")
    assert run(models_, *arguments, "--save-results", tmp_path / "kept") == 0
    printed = capsys.readouterr()
    found = Evaluation.model_validate_json(printed.out)
    rows = found.tasks
    assert found.versions["lm_eval"] == "0.4.99"
    assert {row.task for row in rows} == {"mmlu", "mmlu_law", "wikitext"}
    assert all(row.recovery == 1 for row in rows)
    for model in models_:
        asked = f"--model vllm --model_args pretrained={model},dtype=auto --tasks mmlu"
        assert f"{asked} --batch_size auto" in printed.err
    assert list((tmp_path / "kept").rglob("results_*.json"))


@pytest.mark.slow
def test_tasks_by_the_program_of_another_environment(models_, task_folder, tmp_path):
    program = tmp_path / "lm_eval"
    program.write_text(
        f"#!{sys.executable}\n"
        "import functools, lm_eval.tasks\n"
        "# Without its own fourteen thousand tasks, which take ten seconds to read\n"
        "few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)\n"
        "lm_eval.tasks.TaskManager = few\n"
        "from lm_eval.__main__ import cli_evaluate\n"
        "cli_evaluate()\n"
    )
    program.chmod(0o755)
    settings = TaskSettings(
        ("tiny_words",),
        task_path=task_folder,
        batch_size="4",
        results_folder=tmp_path / "kept",
        program=program,
    )
    model = str(models_[1])
    (row,) = task_results(None, Harness(model, settings).run(model))
    assert row.quantized == pytest.approx(_choices_right(models_[1]))
    assert len(list((tmp_path / "kept").rglob("results_*.json"))) == 1


def test_a_program_that_fails(models_, capsys):
    arguments = ("--no-divergence", "--no-generations", "--tasks", "gsm8k")
    assert run(models_, *arguments, "--lm-eval", shutil.which("false")) == 3
    assert "false ended with exit code 1; see above" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such_task"], "lm-evaluation-harness has no task no_such_task"),
        (["--tasks", "gsm8k", "--task-path", "nowhere"], "--task-path: there is no folder nowhere"),
        (["--text", "nowhere.txt"], "evaluation text: there is no file nowhere.txt"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--samples", "0"], "use at least 1 of 2 tokens"),
        (["--backend", "marlin"], "there is no backend `marlin`; use one of auto, gptqmodel"),
        (["--original-results", "nowhere.json"], "add --tasks"),
        (["--quantized-results", "nowhere"], "there is no file of results"),
        (["--tasks", "gsm8k", "--engine", "vllm"], "vLLM cannot be imported"),
        (["--tasks", "gsm8k", "--lm-eval", "no-program"], "--lm-eval: no-program is no program"),
    ],
)
def test_refused_before_a_model_is_loaded(models_, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("autoround_modifier.evaluation.run.load", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    # The harness itself, without its fourteen thousand tasks, which take ten seconds to read
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    assert run(models_, *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (models_[1] / "evaluation.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-divergence", "--no-generations"],
        ["--engine", "vllm"],
        ["--text", "a.txt", "--no-divergence"],
        ["--tasks", "gsm8k", "--batch-size", "many"],
        ["--match", "split"],
        ["--tasks", "gsm8k", "--model-args", "a"],
    ],
)
def test_wrong_usage(models_, arguments):
    assert run(models_, *arguments) == 2


def test_without_the_extra(models_, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert run(models_, "--tasks", "gsm8k") == 1
    assert "pip install 'autoround-modifier[eval]'" in capsys.readouterr().err


def test_name_without_a_folder(models_, capsys):
    assert run((models_[0], "someone/tiny-w4")) == 1
    assert "is no folder that evaluation.json could be written to" in capsys.readouterr().err


def test_another_original(models_, text, capsys, monkeypatch):
    assert run(models_, "--text", text, "--length", 16, "--no-generations") == 0
    monkeypatch.setattr("autoround_modifier.evaluation.run.load", None)
    assert run(("elsewhere", models_[1])) == 1
    assert "give the same name, replace the file with `--replace`" in capsys.readouterr().err


def test_text_of_calibration(tmp_path, log):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(3, 103)))
    record = read_text(path, tiny_tokenizer(), 4, 20).record
    facts = {"samples": 1, "tokens": 1, "max_length": 1}
    seen = DataRecord(source=None, digest=record.digest, **facts)
    with pytest.raises(EvaluationError, match=r"text.txt is what the model was calibrated on; giv"):
        check_not_calibrated_on(record, seen)
    other = DataRecord(source=str(path), digest="other", **facts)
    with pytest.raises(EvaluationError, match=r"calibrated on text from .*--match COLUMN=VALUE"):
        check_not_calibrated_on(record, other)
    check_not_calibrated_on(record, other, {"split": "eval"})
    assert any("other rows than split=eval" in line for line in log)
    elsewhere = DataRecord(source=str(tmp_path / "other.txt"), digest="other", **facts)
    check_not_calibrated_on(record, elsewhere)
    check_not_calibrated_on(record, None)


def test_packaged_text_has_no_calibration_data():
    found = read_text(None, tiny_tokenizer(), 32, 64)
    assert found.record.source == "the packaged text"
    assert sum(map(len, found.samples)) > 1500


def test_characters_of_several_tokens():
    """Byte tokens of a character of three bytes: the last one is shown as the character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = wrapped("a€b")["input_ids"]
    assert token_texts(wrapped, ids) == ["a", "", "", "€", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "w3"}', r"a.jsonl:1: there is neither a text in `prompt`"),
        ("a.jsonl", '{"prompt": "w3"}\n{', r"a.jsonl:2: no JSON"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"a.jsonl:1: there is neither"),
        ("a.txt", "\n\n", "holds no prompt"),
    ],
)
def test_wrong_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(EvaluationError, match=message):
        read_prompts(tmp_path / name)


def result(task: str, quantized: float, **fields) -> TaskResult:
    return TaskResult(task=task, metric="acc", original=0.5, quantized=quantized, **fields)


def test_recovery():
    assert result("a", 0.25).recovery == 0.5
    assert result("a", 1.0, higher_is_better=False).recovery == 0.5
    assert TaskResult(task="a", metric="acc", original=None, quantized=1.0).recovery is None
    assert TaskResult(task="a", metric="acc", original=0.0, quantized=0.0).recovery is None


def test_merged():
    facts = {"original": "o", "quantized": "q"}
    first = Evaluation(
        versions={"torch": "1"},
        commands=["first"],
        tasks=[result("a", 0.1), result("b", 0.2)],
        **facts,
    )
    second = Evaluation(
        versions={"torch": "2"},
        commands=["second"],
        tasks=[result("b", 0.3)],
        generations=[Generation(prompt="p", original="x", quantized="y")],
        **facts,
    )
    both = merge_evaluations(first, second)
    assert both.tasks == [result("a", 0.1), result("b", 0.3)]
    assert both.generations == second.generations
    assert (both.commands, both.versions) == (["first", "second"], {"torch": "2"})
    assert merge_evaluations(both, both).commands == ["first", "second"]
    assert merge_evaluations(None, first) == first


def harness_results(**changes) -> dict:
    """A file of results, as releases 0.4.0 to 0.4.13 of the harness write it."""
    return {
        "results": {
            "mmlu": {"acc,none": 0.4, "acc_stderr,none": 0.1, "alias": "mmlu"},
            "mmlu_law": {"acc,none": 0.4, "acc_stderr,none": "N/A", "alias": " - law"},
            "wikitext": {"word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A"},
        },
        "groups": {"mmlu": {"acc,none": 0.4, "acc_stderr,none": 0.1, "alias": "mmlu"}},
        "group_subtasks": {"mmlu": ["mmlu_law"], "openllm": ["mmlu"]},
        "n-shot": {"mmlu_law": 5, "wikitext": 0},
        "versions": {"mmlu": 2, "mmlu_law": 1, "wikitext": 2},
        "n-samples": {"mmlu_law": {"original": 100, "effective": 100}},
        "higher_is_better": {"mmlu_law": {"acc": True}, "wikitext": {"word_perplexity": False}},
        **changes,
    }


def test_rows_of_a_file():
    worse = harness_results()
    worse["results"] = {**worse["results"], "wikitext": {"word_perplexity,none": 25.0}}
    rows = {row.task: row for row in task_results(harness_results(), worse)}
    assert list(rows) == ["mmlu", "mmlu_law", "wikitext"]
    assert (rows["mmlu"].quantized_stderr, rows["mmlu"].group) == (0.1, None)
    assert (rows["mmlu_law"].quantized_stderr, rows["mmlu_law"].group) == (None, "mmlu")
    assert rows["mmlu_law"].shots == 5
    assert rows["wikitext"].recovery == pytest.approx(0.8)
    alone = task_results(None, harness_results())
    assert all(row.original is None and math.isfinite(row.quantized) for row in alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n-shot": {"mmlu_law": 0}}, "mmlu_law: examples in the prompt 0 and 5"),
        ({"versions": {"mmlu_law": 0}}, "mmlu_law: version 0 and 1"),
        ({"n-samples": {"mmlu_law": {"original": 100, "effective": 10}}}, "samples 10 and 100"),
    ],
)
def test_results_that_cannot_be_compared(changes, message):
    with pytest.raises(EvaluationError, match=message):
        task_results(harness_results(**changes), harness_results())


def test_chat_template_of_one_model_only():
    first, second = (harness_results(chat_template_sha=sha) for sha in (None, "ab12"))
    with pytest.raises(EvaluationError, match="chat template only with the quantized model"):
        task_results(first, second)


def test_folders_of_results(tmp_path):
    folder = tmp_path / "someone__tiny"
    folder.mkdir()
    with pytest.raises(EvaluationError, match="there is no file of results"):
        read_results(tmp_path)
    old = harness_results(date=1)
    old["results"] = {"mmlu": {"acc,none": 0.1}, "gsm8k": {"exact_match,strict-match": 0.2}}
    (folder / "results_2026-01-01T10-00-00.0.json").write_text(json.dumps(old))
    new = json.dumps(harness_results(date=2))
    (folder / "results_2026-02-01T10-00-00.0.json").write_text(new)
    rows = {row.task: row for row in task_results(None, read_results(tmp_path))}
    assert (rows["mmlu"].quantized, rows["gsm8k"].quantized) == (0.4, 0.2)
    assert rows["gsm8k"].filter == "strict-match"
    other = tmp_path / "someone__other"
    other.mkdir()
    (other / "results_2026-02-01T10-00-00.0.json").write_text(new)
    with pytest.raises(EvaluationError, match=r"several models; name one of .*someone__other"):
        read_results(tmp_path)
    (folder / "no.json").write_text("[]")
    with pytest.raises(EvaluationError, match="is no file of results"):
        read_results(folder / "no.json")


def test_vocabularies_of_two_sizes(pair, tmp_path, text, capsys):
    other = AutoModelForCausalLM.from_pretrained(pair[0])
    other.resize_token_embeddings(VOCABULARY + 8)
    other.save_pretrained(tmp_path / "other")
    arguments = ("--text", text, "--length", 16, "--no-generations")
    assert run((pair[0], tmp_path / "other"), *arguments) == 1
    assert "these are two different models" in capsys.readouterr().err


def test_vllm_runs_the_tasks_alone(models_, tmp_path, capsys, monkeypatch):
    """What vLLM is asked for; it is not installed here."""
    asked = []

    def run_by_vllm(**arguments):
        asked.append(arguments)
        return harness_results()

    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setattr(lm_eval, "simple_evaluate", run_by_vllm)
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    monkeypatch.setattr("autoround_modifier.evaluation.tasks._named_tasks", lambda x, _: list(x))
    arguments = ("--engine", "vllm", "--tasks", "mmlu,wikitext", "--apply-chat-template")
    assert run(models_, *arguments, "--model-args", "tensor_parallel_size=2", "--limit", 9) == 0
    assert "not computed with vLLM: divergence and generations" in capsys.readouterr().err
    for one, model in zip(asked, models_, strict=True):
        assert (one["model"], one["tasks"], one["limit"]) == ("vllm", ["mmlu", "wikitext"], 9)
        assert one["model_args"] == {
            "pretrained": str(model),
            "dtype": "auto",
            "tensor_parallel_size": 2,
        }
        assert one["apply_chat_template"]
        assert one["batch_size"] == "auto"
    saved = read_evaluation(models_[1])
    assert saved is not None
    assert saved.engine == "vllm"
    assert saved.divergence is None
    assert {row.engine for row in saved.tasks} == {"vllm"}


def test_no_room_for_predictions(models_, text, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1000))
    assert run(models_, "--text", text, "--length", 16, "--no-generations") == 1
    error = capsys.readouterr().err
    assert "the original's predictions take" in error
    assert "use fewer `--samples`, or name another disk by TMPDIR" in error


def test_a_model_that_predicts_nan(models_, text, capsys):
    broken = AutoModelForCausalLM.from_pretrained(models_[0])
    with torch.no_grad():
        broken.lm_head.weight[0] = math.nan
    broken.save_pretrained(models_[1])
    assert run(models_, "--text", text, "--length", 16, "--no-generations") == 1
    assert "the quantized model predicts NaN" in capsys.readouterr().err


def test_help_without_pytorch():
    program = (
        "import sys; sys.argv = ['autoround-modifier']\n"
        "from autoround_modifier.cli.main import main\n"
        "assert not any(main([name, '--help']) for name in ('evaluate', 'compare', 'push'))\n"
        "assert not {'torch', 'transformers', 'rich.table'} & set(sys.modules) - {'rich.table'}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
