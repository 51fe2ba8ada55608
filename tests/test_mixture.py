"""Mixtures of calibration data, and the shipped recipes of data."""

from __future__ import annotations

import json
import re

import datasets
import pytest
import yaml
from conftest import quantize, tiny_llama, tiny_tokenizer, weight_scheme

from autoround_modifier import AutoRoundModifier, text_dataset
from autoround_modifier.calibration.documents import TEXT_COLUMNS
from autoround_modifier.calibration.mixture import data_recipes, read_mixture
from autoround_modifier.calibration.sources import HubAccess
from autoround_modifier.errors import CalibrationError

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def files(tmp_path):
    """Two files of documents of four tokens: w10, w10, ... and w20, w20, ..."""
    for name, word in (("a", "w10"), ("b", "w20")):
        rows = [json.dumps({"body": f"{word} " * 4})] * 30
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


def origins(source, num_samples=None) -> list[int]:
    """:return: the first token of each sample"""
    samples = text_dataset(source, tiny_tokenizer(), num_samples, 4, text_column="body")
    return [sample[0] for sample in samples["input_ids"]]


def entries(files, *counts) -> list[dict]:
    return [
        {"path": str(files / f"{name}.jsonl")} | ({} if count is None else {"num_samples": count})
        for name, count in zip("ab", counts, strict=True)
    ]


def test_samples_are_interleaved(files):
    assert origins(entries(files, 2, 6)) == [20, 10, 20, 20, 20, 10, 20, 20]
    assert origins(entries(files, 2, 2)) == [10, 20, 10, 20]


def test_a_smaller_number_keeps_the_proportions(files):
    assert origins(entries(files, 2, 6), 4) == [20, 10, 20, 20]
    assert origins(entries(files, 2, 6), 100) == origins(entries(files, 2, 6))


def test_sources_without_a_number_share_equally(files):
    assert origins(entries(files, None, None), 4) == [10, 20, 10, 20]
    assert sorted(origins(entries(files, None, None), 3)) == [10, 10, 20]


def test_a_source_that_has_fewer(files, log):
    assert origins(entries(files, 31, 1)).count(10) == 30
    assert any(
        "a.jsonl: 30 samples" in line and "up to 31 samples were wanted" in line for line in log
    )


def test_a_share_of_no_sample(files, log):
    assert origins(entries(files, 1, 29), 1) == [20]
    assert any("a.jsonl: its share of 1 samples is none" in line for line in log)


def test_each_source_has_its_own_columns(files):
    (files / "c.jsonl").write_text(
        "\n".join(json.dumps({"code": f"w{n} " * 4, "split": "ab"[n % 2]}) for n in range(30, 38))
    )
    source = [
        {"path": str(files / "a.jsonl"), "num_samples": 1, "text_column": "body"},
        {"path": str(files / "c.jsonl"), "num_samples": 3, "text_column": "code"}
        | {"match": {"split": "b"}},
    ]
    assert sorted(origins(source)) == [10, 31, 33, 35]


def test_a_recipe_of_data(files, monkeypatch, tmp_path_factory):
    """A relative path is looked up beside the recipe."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = files / "mine.yaml"
    recipe.write_text(
        "datasets:\n  - {path: a.jsonl, num_samples: 1}\n  - {path: b.jsonl, num_samples: 1}\n"
    )
    assert origins(recipe) == origins(str(recipe)) == [10, 20]
    assert origins({"datasets": entries(files, 1, 1)}) == [10, 20]
    assert origins(entries(files, 3, 1)[0]) == [10, 10, 10]


WRONG = {
    "- path: a.jsonl\n": ("", "a list `datasets:`"),
    "datasets: a.jsonl\n": ("", "is not a list"),
    "datasets: []\n": ("", "is not a list"),
    "datasets:\n  - a.jsonl\n": (":2", "'a.jsonl' is not a mapping"),
    "datasets:\n  - path: a\n  - nmu_samples: 3\n": (":3", "did you mean `num_samples`?"),
    "datasets:\n  - path: a\n    zzz: 3\n": (":2", "no field `zzz`; use path, num_samples"),
    "datasets:\n  - num_samples: 3\n": (":2", "no `path`"),
    "datasets:\n  - {path: a, num_samples: 0}\n": (":2", "num_samples is 0"),
    "datasets:\n  - {path: a, num_samples: true}\n": (":2", "num_samples is True"),
    "datasets:\n  - {path: a, match: b}\n": (":2", "`match` is not a mapping"),
    "datasets:\n  - {path: a, num_samples: 3}\n  - {path: b}\n": (
        "",
        "to all datasets, or to none",
    ),
    "datasets: [\n": ("", "not valid YAML"),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes_of_data(tmp_path, text):
    line, problem = WRONG[text]
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=re.escape(f"{path}{line}: ")) as error:
        text_dataset(path, tiny_tokenizer())
    assert problem in str(error.value)


def test_wrong_mixtures_in_python(files):
    with pytest.raises(CalibrationError, match=r"dataset\[1\]: no field `nums`"):
        text_dataset([*entries(files, None, None)[:1], {"nums": 3}], tiny_tokenizer())
    with pytest.raises(CalibrationError, match=r"is a file and has no split `calib`.*match"):
        text_dataset({"path": str(files / "a.jsonl"), "split": "calib"}, tiny_tokenizer())
    with pytest.raises(CalibrationError, match="is a file, for which `name` means nothing"):
        text_dataset({"path": str(files / "a.jsonl"), "name": "x"}, tiny_tokenizer())


def test_oneshot_takes_a_mixture(files):
    recipe = AutoRoundModifier(iters=1, batch_size=2, config_groups={"group_0": weight_scheme(4)})
    quantize(tiny_llama(), recipe, entries(files, 4, 4), max_seq_length=4, text_column="body")
    assert len(recipe.block_reports) == 2


# ---------------------------------------------------------------------- shipped ones


def test_shipped_recipes_of_data():
    assert set(data_recipes()) == {"chat", "code", "mixed"}
    for path in data_recipes().values():
        content = yaml.safe_load(path.read_text())
        assert path.read_text().startswith("# ")
        assert sum(entry["num_samples"] for entry in content["datasets"]) == 512
        assert all(entry["text_column"] in TEXT_COLUMNS for entry in content["datasets"])


@pytest.mark.parametrize("name", ["chat", "code", "mixed"])
def test_shipped_recipes_load_what_they_name(name, monkeypatch):
    """The Hub is replaced by data in memory, of the columns that the datasets have."""
    asked = []
    message = {"role": "user", "content": "w3 " * 5}

    def load(path, config, **arguments):
        asked.append((path, config, arguments["split"], arguments["streaming"]))
        rows = {"messages": [message], "text": "w4 " * 8, "content": "w5 " * 8}
        wanted = {"NeelNanda/pile-10k": "text", "codeparrot/codeparrot-clean-valid": "content"}
        column = wanted.get(path, "messages")
        return datasets.Dataset.from_dict({column: [rows[column]] * 800})

    monkeypatch.setattr("autoround_modifier.calibration.sources.load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    samples = text_dataset(name, tokenizer, max_seq_length=8)
    assert len(samples) == 512
    assert len(text_dataset(name, tokenizer, 128, max_seq_length=8)) == 128
    expected = [(x.path, x.name, x.split, True) for x in read_mixture(name)]
    assert asked == expected * 2


def test_without_network_a_shipped_recipe_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    with pytest.raises(CalibrationError, match="ultrachat_200k --local-dir FOLDER") as error:
        text_dataset("chat", tokenizer)
    assert "as far as it is on this machine" in str(error.value)


def test_a_local_copy_of_a_dataset_of_the_hub(tmp_path, monkeypatch):
    """As `hf download --repo-type dataset` leaves it, with configurations in its card."""
    folder = tmp_path / "owner" / "data"
    for config in ("one", "two"):
        (folder / config).mkdir(parents=True)
        data = datasets.Dataset.from_dict({"text": [f"w{3 + len(config)} " * 4, "w9 " * 4]})
        data.to_parquet(folder / config / "train_sft.parquet")
    configs = [
        {"config_name": name, "data_files": [{"split": "train_sft", "path": f"{name}/*.parquet"}]}
        for name in ("one", "two")
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    monkeypatch.chdir(tmp_path)
    source = {"path": "owner/data", "name": "two", "split": "train_sft"}
    assert text_dataset(source, tiny_tokenizer(), 9, 4)["input_ids"] == [[6] * 4, [9] * 4]
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        text_dataset({**source, "name": "three"}, tiny_tokenizer(), 9, 4)


def test_tokens_reach_the_hub(monkeypatch):
    seen = {}

    def load(path, config, **arguments):
        seen.update(arguments, path=path)
        return datasets.Dataset.from_dict({"text": ["w3 " * 4]})

    monkeypatch.setattr("autoround_modifier.calibration.sources.load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (source,) = read_mixture({"path": "owner/data", "revision": "v2"})
    assert len(list(source.records(HubAccess("secret", local_files_only=True)))) == 1
    assert seen["token"] == "secret"
    assert seen["revision"] == "v2"
    assert seen["streaming"] is False
    assert seen["download_config"].local_files_only is True
