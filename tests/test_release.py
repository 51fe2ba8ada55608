"""`release`: quantize, evaluate, judge, card; what is done is not done again."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import sys
from dataclasses import dataclass

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import pytest
import yaml
from conftest import ROOT, tiny_llama

from autoround_modifier.cli.main import main
from autoround_modifier.cli.outcome import DONE, FAILED, REFUSED
from autoround_modifier.errors import EvaluationError, RecipeError
from autoround_modifier.release import pipeline
from autoround_modifier.release.file import read_release
from autoround_modifier.report.schema import EVALUATION_FILE, read_evaluation, read_report

sys.path.insert(0, str(ROOT / "examples" / "release"))
from continuation_task import BEGINNING, CHOICES, CONTINUATION, questions, write_task

EXAMPLE = ROOT / "examples" / "release" / "smollm2.yaml"


def documents(count: int, words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randint(3, 127)}" for _ in range(words)) for _ in range(count)]


def write_rows(path, texts) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """:return: a folder with text and a task for a tiny model"""
    folder = tmp_path_factory.mktemp("release")
    write_rows(folder / "calibration.jsonl", documents(8, 40, seed=1))
    held_out = documents(4, 90, seed=2)
    write_rows(folder / "held-out.jsonl", held_out)
    write_task(
        [
            {
                **row,
                "beginning": " ".join(row["beginning"].split()[:8]),
                "choices": [" ".join(choice.split()[:4]) for choice in row["choices"]],
            }
            for row in questions(held_out)
        ],
        folder / "tasks",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        # without the harness' own fourteen thousand tasks
        few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        patch.setattr(lm_eval.tasks, "TaskManager", few)
        yield folder


@pytest.fixture
def folder(material, tmp_path):
    """:return: the same, with nothing else in it"""
    for path in material.iterdir():
        if path.name in ("calibration.jsonl", "held-out.jsonl", "tasks"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def write_release(folder, **changes):
    fields = {"iters": 1, "batch_size": 2, "num_calibration_samples": 4}
    content = {
        "model": tiny_llama().config._name_or_path,
        "output": "checkpoints",
        "checkpoints": [
            {"name": "tiny-w4", "scheme": "W4A16G32", "fields": fields},
            {"name": "tiny-w2", "scheme": "W2A16G32", "fields": fields},
        ],
        "data": {"dataset": "calibration.jsonl", "max_seq_length": 12},
        "evaluation": {
            "text": "held-out.jsonl",
            "samples": 2,
            "length": 12,
            "tasks": ["continuations"],
            "task_path": "tasks",
            "batch_size": "2",
        },
        **changes,
    }
    path = folder / "release.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@dataclass
class Run:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str
    cards: list[str]


def run_release(folder, *flags: str, **changes) -> Run:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["release", write_release(folder, **changes), *flags])
    cards = sorted(path.parent.name for path in (folder / "checkpoints").glob("*/README.md"))
    return Run(code, out.getvalue(), err.getvalue(), cards)


@pytest.fixture(scope="module")
def runs(material) -> list[Run]:
    """
    :return: a run that fails at the last evaluation; one that goes on, and demands what one
        checkpoint does not reach; one without demands
    """
    evaluate = pipeline.evaluate_checkpoint

    def fails(original, quantized, *args, **kwargs):
        if quantized.endswith("tiny-w2"):
            raise EvaluationError("no memory")
        return evaluate(original, quantized, *args, **kwargs)

    demands = {"max_kl": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "evaluate_checkpoint", fails)
        failed = run_release(material, keep=demands)
    return [failed, run_release(material, keep=demands), run_release(material, "--json")]


def test_goes_on_after_a_failure(runs):
    failed, again, _ = runs
    assert failed.code == FAILED
    assert "tiny-w2: no memory" in failed.err
    assert "finished: tiny-w4" in failed.err
    assert again.code == DONE
    assert "quantizing" not in again.err
    assert "evaluating tiny-w2" in again.err
    assert "evaluating tiny-w4" not in again.err


def test_what_falls_short_gets_no_card(runs):
    _, short, _ = runs
    assert "tiny-w4: kept" in short.out
    assert "tiny-w2: not kept" in short.out
    assert "at most 0.5 is demanded" in short.out
    assert short.cards == ["tiny-w4"]


def test_every_step(runs, material):
    made = runs[-1]
    assert made.code == DONE
    assert "quantizing" not in made.err
    assert "evaluating" not in made.err
    facts = json.loads(made.out)
    assert [one["name"] for one in facts] == made.cards[::-1] == ["tiny-w4", "tiny-w2"]
    assert all(one["kept"] and one["url"] is None for one in facts)
    for one in facts:
        checkpoint = material / "checkpoints" / one["name"]
        assert read_report(checkpoint).layers
        evaluation = read_evaluation(checkpoint)
        (task,) = evaluation.tasks
        assert one["recovery"] == task.recovery
        assert "continuations" in (checkpoint / "README.md").read_text()
        assert (checkpoint / "quantization_report.html").is_file()
        assert not list((material / "checkpoints" / ".release" / one["name"]).glob("blocks*"))
    # The original runs once.
    assert len(read_evaluation(material / "checkpoints" / "tiny-w2").task_commands) == 1


def test_demands_are_judged_again_and_never_without_an_evaluation(runs, material, monkeypatch):
    checkpoint = material / "checkpoints" / "tiny-w2"
    evaluation = read_evaluation(checkpoint)
    (checkpoint / EVALUATION_FILE).unlink()
    monkeypatch.setattr(pipeline, "evaluate_checkpoint", lambda *args, **kwargs: evaluation)
    refused = run_release(material, keep={"max_kl": 1e-6})
    assert refused.code == REFUSED
    assert "quantizing" not in refused.err
    assert "evaluating tiny-w2" in refused.err
    assert "evaluating tiny-w4" not in refused.err
    assert "tiny-w2: not kept" in refused.out


def test_other_settings_do_not_overwrite(runs, material):
    data = {"dataset": "calibration.jsonl", "max_seq_length": 16}
    refused = run_release(material, data=data)
    assert refused.code == REFUSED
    assert "was made with other settings" in refused.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoints": [{"name": "a"}]}, "give one of `recipe`, `scheme` and `auto_scheme`"),
        ({"checkpoints": [{"name": "a/b", "scheme": "W4A16"}]}, "checkpoints.0.name"),
        ({"checkpoints": [{"name": "a", "scheme": "W4A16"}] * 2}, "two checkpoints are named a"),
        ({"keep": {"min_recovery": 0.9}, "evaluation": {}}, "needs `evaluation.tasks`"),
        ({"modle": "x"}, "modle"),
        ({"checkpoints": [{"name": "a", "scheme": "W9"}]}, "unknown scheme `W9`"),
        ({"model": "nobody/nothing"}, "nobody/nothing"),
        ({"publish": {"owner": "me", "platform": "hugs"}}, "unknown platform `hugs`"),
        ({"publish": {"owner": "me"}}, "HF_HUB_OFFLINE is set"),
        ({"evaluation": {"text": "nowhere.jsonl"}}, "there is no file"),
        ({"evaluation": {"tasks": ["nothing"], "task_path": "tasks"}}, "has no task nothing"),
    ],
)
def test_refused_before_the_first_step(folder, changes, said, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["release", write_release(folder, **changes), "--dry-run"]) == REFUSED
    assert said in capsys.readouterr().err
    assert not (folder / "checkpoints").exists()


def test_the_example_is_sound():
    release = read_release(EXAMPLE)
    assert release.output == EXAMPLE.parent / "checkpoints"
    tiny = release.tiny()
    assert tiny.output.name == "checkpoints-tiny"
    assert [entry.fields["iters"] for entry in tiny.checkpoints] == [2, 0]
    assert tiny.checkpoints[1].fields["scale_search"] is False
    assert tiny.keep.min_recovery is None
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_release(ROOT / "README.md")


@pytest.mark.slow
@pytest.mark.smollm2
def test_tiny_on_smollm2(folder):
    """The example of a release, on the packaged model, without a network."""
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import save_smollm2

    (folder / "smollm2-135m-instruct").symlink_to(save_smollm2())
    (folder / "smollm2.yaml").write_text(EXAMPLE.read_text())
    assert main(["release", str(folder / "smollm2.yaml"), "--tiny"]) == DONE
    made = sorted(path.name for path in (folder / "checkpoints-tiny").glob("SmolLM2*"))
    assert made == [
        "SmolLM2-135M-Instruct-FP8-dynamic",
        "SmolLM2-135M-Instruct-quantized.w4a16",
    ]
    for name in made:
        assert (folder / "checkpoints-tiny" / name / "README.md").is_file()


def test_questions_have_one_right_answer():
    texts = documents(CHOICES, 2 * (BEGINNING + CONTINUATION) + 5, seed=3)
    found = questions(texts)
    assert len(found) == 2 * CHOICES
    for row in found:
        whole = f"{row['beginning']} {row['choices'][row['answer']]}"
        assert sum(whole in text for text in texts) == 1
        wrong = [x for x in row["choices"] if x != row["choices"][row["answer"]]]
        assert not any(f"{row['beginning']} {x}" in text for text in texts for x in wrong)
    with pytest.raises(ValueError, match="fewer than 4 documents"):
        questions(texts[:3])
