"""Calibration samples from texts: files, lists and datasets, cutting and joining, BOS."""

from __future__ import annotations

import csv
import gzip
import json
import re

import datasets
import pytest
import torch
from conftest import quantize, tiny_llama, tiny_tokenizer, weight_scheme
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing

from autoround_modifier import AutoRoundModifier, oneshot, self_generated, text_dataset
from autoround_modifier.errors import CalibrationError

EOS = 1
DOCUMENTS = ["w10 w11 w12 w13 w14 w15 w16 w17 w18", "w20 w21 w22 w23", "w30", "w40 w41 w42 w43 w44"]
# The first pieces, the second pieces, and at last what is short. The last rest, 44, is too short.
SAMPLES = [
    [10, 11, 12, 13],
    [20, 21, 22, 23],
    [40, 41, 42, 43],
    [14, 15, 16, 17],
    [30, EOS, 18, EOS],
]


def tokenizer_with(single: str, **special: int):
    """The tiny tokenizer, with a post-processor such as those of Llama 3 and Gemma."""
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=list(special.items())
    )
    return tokenizer


def tokenizer_with_bos():
    """Texts begin with BOS, which is id 0 here, ``<pad>``."""
    tokenizer = tokenizer_with("<pad> $A", **{"<pad>": 0})
    tokenizer.bos_token = "<pad>"
    return tokenizer


def as_lines(documents) -> str:
    return "\n".join(json.dumps({"text": text}) for text in documents) + "\n"


def as_array(documents, indent=None) -> str:
    return json.dumps([{"text": text} for text in documents], indent=indent)


def words(start: int, count: int) -> str:
    return " ".join(f"w{start + index}" for index in range(count))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_lines(DOCUMENTS)),
        ("a.ndjson", as_lines(DOCUMENTS)),
        ("a.json", as_lines(DOCUMENTS)),
        ("a.json", as_array(DOCUMENTS)),
        ("a.json", as_array(DOCUMENTS, indent=1)),
        ("a.json", "\n \n" + as_array(DOCUMENTS, indent=2) + "\n"),
        ("a.json", json.dumps(DOCUMENTS)),
        ("a.jsonl", "\ufeff" + as_lines(DOCUMENTS)),
        ("a.json", "\ufeff" + as_array(DOCUMENTS)),
        ("a.csv", "id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(DOCUMENTS))),
    ],
    ids=[
        "lines",
        "ndjson",
        "lines in .json",
        "array",
        "indented",
        "blank lines",
        "array of strings",
        "BOM",
        "BOM and array",
        "csv",
    ],
)
@pytest.mark.parametrize("compressed", [False, True], ids=["", "gz"])
def test_files_that_are_read(tmp_path, name, content, compressed):
    data = content.encode()
    path = tmp_path / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert text_dataset(path, tiny_tokenizer(), 10, 4)["input_ids"] == SAMPLES


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": DOCUMENTS, "other": range(4)}).to_parquet(path)
    assert text_dataset(path, tiny_tokenizer(), 10, 4)["input_ids"] == SAMPLES


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_with_a_byte_order_mark(tmp_path, name):
    data = ("\ufeff" + words(10, 6) + "\n\n" + words(16, 2)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    samples = text_dataset(tmp_path / name, tiny_tokenizer(), 10, 4)["input_ids"]
    assert samples == [[10, 11, 12, 13], [14, 15, 16, 17]]


def test_long_fields_of_csv(tmp_path):
    limit = csv.field_size_limit()
    text = words(10, 4) + " w3" * 60_000
    (tmp_path / "a.csv").write_text(f"text\n{text}\n")
    assert text_dataset(tmp_path / "a.csv", tiny_tokenizer(), 1, 4)["input_ids"] == SAMPLES[:1]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('{"text": "w3"}\n{"text": 5}\n', 2, "`text` is 5"),
        ('{"text": "w3"}\n{"text": ["w4"]}\n', 2, '`text` is ["w4"]'),
        ('{"text": "w3"}\n\n["w3", "w4"]\n', 3, "is neither a text nor an object"),
        ('{"text": "w3"}\n{"text": "w4"\n', 2, "not a JSON value on one line"),
        ('{\n "text": "w3"\n}\n', 1, "not a JSON value on one line"),
        ('[{"text": "w3"},\n {"text": "w4"}\n {"text": "w5"}]', 3, "not valid JSON"),
        ('[\n {"text": "w3"},\n\n {"text": 7}\n]', 4, "`text` is 7"),
        ('{"body": "w3", "id": 4}\n', 1, "no field `text`"),
        ('{"body": "w3", "id": 4}\n', 1, "this row has ['body', 'id']"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path, content, line, problem):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=re.escape(f"{path}:{line}: ")) as error:
        text_dataset(path, tiny_tokenizer(), 10, 4)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"w3 \xff\xfe w4", "not UTF-8"),
        ("a.zip", b"PK\x03\x04\xff", "not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(as_lines(DOCUMENTS * 50).encode())[:-20], "gzip"),
        ("a.parquet", b"PAR1 no parquet", "not a Parquet file"),
        ("a.csv", b'text\nw3\n"w4\n', "a.csv:3: not valid CSV"),
        ("a.json", b"", "dataset is empty"),
        ("a.json", b"[]", "dataset is empty"),
        ("a.txt", b" \n", "none of 1 rows holds any text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=re.escape(str(tmp_path / name))) as error:
        text_dataset(tmp_path / name, tiny_tokenizer(), 200, 4)
    assert problem in str(error.value)


@pytest.mark.parametrize("name", ["data/text.jsonl", "text.jsonl", "./folder"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(CalibrationError, match=re.escape(f"no file or folder `{name}`")):
        oneshot(
            model=tiny_llama(),
            tokenizer=tiny_tokenizer(),
            recipe=AutoRoundModifier(preset="rtn", config_groups={"group_0": weight_scheme(4)}),
            dataset=name,
        )


@pytest.mark.parametrize("empty", [None, "", " \n"])
def test_null_and_empty_texts_are_skipped_and_counted(tmp_path, empty, log):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([empty, *DOCUMENTS[:2], empty]) + "null\n")
    assert text_dataset(path, tiny_tokenizer(), 3, 4)["input_ids"] == [
        SAMPLES[0],
        SAMPLES[1],
        SAMPLES[3],
    ]
    assert "left out: 3 rows without text" in log[-1]
    path.write_text(as_lines([empty]))
    with pytest.raises(CalibrationError, match="none of 1 rows holds any text"):
        text_dataset(path, tiny_tokenizer(), 3, 4)


def test_reading_stops_when_there_is_enough(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(DOCUMENTS) + "this line would be refused\n")
    assert text_dataset(path, tiny_tokenizer(), 3, 4)["input_ids"] == SAMPLES[:3]


def test_rows_are_chosen_by_their_columns(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [
        {"text": words(10, 9), "split": "calib"},
        {"text": words(50, 4), "split": "calib"},
        {"text": words(70, 8), "split": "eval"},
        {"text": words(90, 8)},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = text_dataset(path, tiny_tokenizer(), 10, 4, split="calib")
    assert data["input_ids"] == [[10, 11, 12, 13], [50, 51, 52, 53], [14, 15, 16, 17]]
    assert data["attention_mask"] == [[1] * 4] * 3
    with pytest.raises(CalibrationError, match=r"none of 4 rows has pakcing=True.*\['text'\]"):
        text_dataset(path, tiny_tokenizer(), 10, 4, pakcing=True)


# ---------------------------------------------------------------------- cutting and joining


def test_short_documents_are_joined(log):
    """Of 21 documents of 3 tokens one is left out, as 8 tokens of a sample hold two of them."""
    documents = [words(3 + 3 * index, 3) for index in range(21)]
    samples = text_dataset(documents, tiny_tokenizer(), 100, 8)["input_ids"]
    assert samples[0] == [3, 4, 5, EOS, 6, 7, 8, EOS]
    assert [len(sample) for sample in samples] == [8] * 10
    text = [token for sample in samples for token in sample if token != EOS]
    assert text == list(range(3, 63))
    assert "10 samples of 8 tokens; 80 tokens of 21 documents" in log[-1]
    assert "left out: 1 documents or rests of fewer than 4 tokens" in log[-1]
    assert "up to 100 samples were wanted" in log[-1]
    assert log[-1].startswith("WARNING")
    assert text_dataset(documents, tiny_tokenizer(), 100, 8)["input_ids"] == samples


def test_documents_that_are_cut_go_on_in_the_next_sample():
    samples = text_dataset([words(10, 5), words(20, 5)], tokenizer_with_bos(), 9, 8)["input_ids"]
    assert samples == [[0, 10, 11, 12, 13, 14, EOS, 0], [0, 20, 21, 22, 23, 24]]
    samples = text_dataset([words(10, 3), words(20, 6)], tokenizer_with_bos(), 9, 8)["input_ids"]
    assert samples == [[0, 10, 11, 12, EOS, 0, 20, 21], [0, 22, 23, 24, 25]]


def test_enough_samples_are_no_warning(log):
    text_dataset([words(10, 4), words(20, 4)], tiny_tokenizer(), 1, 4)
    assert log == ["INFO the list: 1 samples of 4 tokens; 4 tokens of 1 documents in 1 rows\n"]


def test_a_tokenizer_without_eos_joins_without_it():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    samples = text_dataset([words(10, 3), words(20, 3)], tokenizer, 9, 4)["input_ids"]
    assert samples == [[10, 11, 12, 20], [21, 22]]


def test_without_packing_documents_stay_whole(log):
    documents = [words(10, 9), words(30, 3), words(40, 1), words(50, 4)]
    samples = text_dataset(documents, tiny_tokenizer(), 10, 4, packing=False)["input_ids"]
    assert samples == [[10, 11, 12, 13], [30, 31, 32], [50, 51, 52, 53], [14, 15, 16, 17]]
    assert "left out: 2 documents or rests of fewer than 2 tokens" in log[-1]


def test_documents_shorter_than_any_sample():
    with pytest.raises(CalibrationError, match="fewer than the 16 tokens of the shortest sample"):
        text_dataset([words(3, 3)], tiny_tokenizer(), 10, 64)
    assert len(text_dataset([words(3, 16)], tiny_tokenizer(), 10, 64)["input_ids"][0]) == 16


def test_one_short_document_is_used_whole():
    """A text that does not fill one sample calibrates all the same."""
    assert text_dataset([words(3, 40)], tiny_tokenizer())["input_ids"] == [list(range(3, 43))]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_samples": 0}, "0 calibration samples"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
        ({"source": None}, "None is no file, folder"),
        ({"source": [[3, 4]]}, r"row 1: \[3, 4\] is neither a text nor an object with a field"),
    ],
)
def test_arguments_that_give_nothing(arguments, problem):
    with pytest.raises(CalibrationError, match=problem):
        text_dataset(**{"source": DOCUMENTS, "tokenizer": tiny_tokenizer(), **arguments})


def test_samples_fit_the_model_of_the_tokenizer(log):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    assert text_dataset(DOCUMENTS, tokenizer, 10, 2048)["input_ids"] == SAMPLES
    assert "model_max_length 4" in log[0]


@pytest.mark.parametrize("ready", [False, True], ids=["text", "ids"])
def test_padded_batches_lose_nothing(ready):
    """LLM-Compressor's collator would cut both samples to 20 tokens."""
    ids = [list(range(10, 40)), list(range(60, 80))]
    data = Dataset.from_dict({"input_ids": ids}) if ready else [words(10, 30), words(60, 20)]
    model, seen = tiny_llama(), []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist())
    )
    quantize(
        model,
        AutoRoundModifier(preset="opt_rtn", config_groups={"group_0": weight_scheme(4)}),
        data,
        max_seq_length=32,
        batch_size=2,
        **({} if ready else {"packing": False}),
    )
    assert seen[-1] == [ids[0], ids[1] + [0] * 10]


# ---------------------------------------------------------------------- BOS


def test_samples_begin_with_bos_where_the_tokenizer_adds_it():
    tokenizer = tokenizer_with_bos()
    expected = [[0, 10, 11, 12], [0, 20, 21, 22], [0, 13, 14, 15], [0, 16, 17, 18], [0, 23]]
    assert text_dataset(DOCUMENTS[:2], tokenizer, 10, 4)["input_ids"] == expected
    without = text_dataset(DOCUMENTS[:2], tokenizer, 10, 4, add_bos_token=False)["input_ids"]
    assert without == [[10, 11, 12, 13], [20, 21, 22, 23], [14, 15, 16, 17]]


def test_every_source_of_text_begins_alike(tmp_path):
    (tmp_path / "a.jsonl").write_text(as_lines(DOCUMENTS))
    Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    tokenizer = tokenizer_with_bos()
    sources = [tmp_path / "a.jsonl", tmp_path / "saved", DOCUMENTS]
    sources += [Dataset.from_dict({"text": DOCUMENTS})]
    found = [text_dataset(source, tokenizer, 10, 4)["input_ids"] for source in sources]
    assert found[0][0] == [0, 10, 11, 12]
    assert all(samples == found[0] for samples in found)


def test_bos_in_the_text_is_not_doubled():
    """Text that was written with a chat template often has it."""
    samples = text_dataset([f"<pad> {words(10, 3)}"], tokenizer_with_bos(), 10, 4)["input_ids"]
    assert samples == [[0, 10, 11, 12]]


def test_other_special_tokens_of_the_tokenizer():
    """GLM begins texts with two tokens, none of them BOS; some tokenizers end texts with one."""
    tokenizer = tokenizer_with("<pad> <unk> $A <eos>", **{"<pad>": 0, "<unk>": 2, "<eos>": EOS})
    assert tokenizer.bos_token is None
    samples = text_dataset([words(10, 3), words(20, 8)], tokenizer, 10, 7)["input_ids"]
    assert samples == [
        [0, 2, 20, 21, 22, 23, 24],
        [0, 2, 10, 11, 12, EOS, 0],
        [0, 2, 25, 26, 27, EOS],
    ]
    whole = text_dataset([words(10, 3)], tokenizer, 10, 7, packing=False)["input_ids"]
    assert whole == [tokenizer(words(10, 3))["input_ids"]] == [[0, 2, 10, 11, 12, EOS]]


def test_bos_can_be_asked_for():
    tokenizer = tiny_tokenizer()
    with pytest.raises(CalibrationError, match="no BOS token"):
        text_dataset(["w10 w11 w12"], tokenizer, 10, 4, add_bos_token=True)
    tokenizer.bos_token = "<pad>"
    samples = text_dataset(["w10 w11 w12"], tokenizer, 10, 4, add_bos_token=True)["input_ids"]
    assert samples == [[0, 10, 11, 12]]


def test_generated_samples_begin_with_bos():
    samples = self_generated(tiny_llama(), tokenizer_with_bos(), 3, 8)["input_ids"]
    assert [len(sample) for sample in samples] == [8, 8, 8]
    assert all(sample[0] == 0 and sample[1] > 2 for sample in samples)


# ---------------------------------------------------------------------- other sources


def test_datasets_in_memory(tmp_path):
    data = Dataset.from_dict({"body": DOCUMENTS, "text": [None] * 4})
    tokenizer = tiny_tokenizer()
    assert text_dataset(data, tokenizer, 10, 4, text_column="body")["input_ids"] == SAMPLES
    stream = data.to_iterable_dataset()
    assert text_dataset(stream, tokenizer, 10, 4, text_column="body")["input_ids"] == SAMPLES
    renamed = data.remove_columns("text").rename_column("body", "content")
    for splits in ({"train": renamed, "test": data}, {"only": renamed}):
        found = text_dataset(DatasetDict(splits), tokenizer, 10, 4)["input_ids"]
        assert found == SAMPLES
    with pytest.raises(CalibrationError, match="no split `train`; it has a, b"):
        text_dataset(DatasetDict({"a": data, "b": data}), tokenizer, 10, 4)
    rows = [{"text": text} for text in DOCUMENTS]
    assert text_dataset(rows, tokenizer, 10, 4)["input_ids"] == SAMPLES


def test_folders(tmp_path):
    tokenizer = tiny_tokenizer()
    texts = tmp_path / "texts"
    (texts / "b").mkdir(parents=True)
    for name, text in zip(["a.txt", "b/c.txt", "b/d.md", "e.txt"], DOCUMENTS, strict=True):
        (texts / name).write_text(text.replace(" ", "\n"))
    assert text_dataset(texts, tokenizer, 10, 4)["input_ids"] == SAMPLES
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text(as_lines(DOCUMENTS))
    (rows / "test.jsonl").write_text(as_lines(["w99 " * 4]))
    assert text_dataset(str(rows), tokenizer, 10, 4)["input_ids"] == SAMPLES
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="the folder is empty"):
        text_dataset(tmp_path / "empty", tokenizer, 10, 4)


def test_a_dataset_that_is_not_on_this_machine(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="cannot be loaded") as error:
        text_dataset("owner/data", tiny_tokenizer(), 10, 4)
    assert "hf download --repo-type dataset owner/data" in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DOCUMENTS * 4,
        lambda: Dataset.from_dict({"content": DOCUMENTS * 4}),
        lambda: Dataset.from_dict({"text": [*DOCUMENTS, "", None] * 4}),
        lambda: [{"input_ids": [3, 4, 5, 6], "attention_mask": [1] * 4}] * 4,
    ],
    ids=["list of strings", "content", "empty and null", "rows of ids"],
)
def test_oneshot_takes_texts_without_max_seq_length(make):
    """The tokenizer has no `model_max_length`."""
    recipe = AutoRoundModifier(iters=1, batch_size=2, config_groups={"group_0": weight_scheme(4)})
    quantize(tiny_llama(), recipe, make())
    assert len(recipe.block_reports) == 2


def test_oneshot_takes_all_samples(monkeypatch):
    """Neither LLM-Compressor's limit of 512 samples, nor a warning that there are fewer."""
    seen = []
    monkeypatch.setattr("autoround_modifier.entrypoint.host_oneshot", lambda **x: seen.append(x))
    recipe = AutoRoundModifier(preset="rtn", config_groups={"group_0": weight_scheme(4)})
    model = tiny_llama()  # of 64 positions
    for dataset in ([words(3, 100)] * 3, [{"path": [words(3, 64)] * 600, "num_samples": 600}]):
        quantize(model, recipe, dataset)
    assert [call["num_calibration_samples"] for call in seen] == [5, 600]
    assert len(seen[0]["dataset"]["input_ids"][0]) == 64


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"body": ["w3"]}, "it has `body`"),
        ({"question": ["w3"], "answer": ["w4"]}, "it has `question`, `answer`"),
    ],
)
def test_oneshot_names_the_columns_that_are_there(columns, problem):
    recipe = AutoRoundModifier(iters=1, config_groups={"group_0": weight_scheme(4)})
    with pytest.raises(CalibrationError, match="no column `text`") as error:
        quantize(tiny_llama(), recipe, Dataset.from_dict(columns))
    assert problem in str(error.value)
    assert "text_column" in str(error.value)


def test_what_others_make_samples_of_is_handed_on(monkeypatch):
    seen = []
    monkeypatch.setattr("autoround_modifier.entrypoint.host_oneshot", lambda **x: seen.append(x))
    recipe = AutoRoundModifier(preset="rtn", config_groups={"group_0": weight_scheme(4)})
    ready = Dataset.from_dict({"input_ids": [[3, 4]], "loss_mask": [[0, 1]]})
    images = Dataset.from_dict({"text": ["w3"], "images": [["a.png"]]})
    questions = Dataset.from_dict({"question": ["w3"]})
    quantize(tiny_llama(), recipe, ready)
    quantize(tiny_llama(), recipe, images)
    quantize(tiny_llama(), recipe, "wikitext")
    quantize(tiny_llama(), recipe, questions, preprocessing_func=lambda row: row)
    assert [call["dataset"] for call in seen] == [ready, images, "wikitext", questions]
    assert seen[0]["use_loss_mask"] is True
    with pytest.raises(CalibrationError, match="`packing` apply to text"):
        quantize(tiny_llama(), recipe, ready, packing=True)


# ---------------------------------------------------------------------- generated text


def test_self_generated():
    model = tiny_llama()
    state = torch.get_rng_state()
    first, again, other = (
        self_generated(model, tiny_tokenizer(), 5, 8, batch_size=2, seed=seed) for seed in (1, 1, 2)
    )
    assert [len(row) for row in first["input_ids"]] == [8] * 5
    assert first["input_ids"] == again["input_ids"]
    assert first["input_ids"] != other["input_ids"]
    assert torch.equal(torch.get_rng_state(), state)


def test_generated_text_has_no_token_that_the_model_lacks():
    """Gemma 3's tokenizer has one more than the text models."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{index}" for index in range(5_000)])
    samples = self_generated(tiny_llama(), tokenizer, 20, 2)["input_ids"]
    assert max(max(sample) for sample in samples) < 128


def test_generated_text_of_no_tokens():
    with pytest.raises(CalibrationError, match="use at least 1 of 2"):
        self_generated(tiny_llama(), tiny_tokenizer(), 5, 1)
