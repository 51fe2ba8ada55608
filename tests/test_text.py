"""Calibration text from files."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from autoround_modifier import self_generated, text_dataset
from autoround_modifier.errors import CalibrationError

DOCUMENTS = ["w10 w11 w12 w13 w14 w15 w16 w17 w18", "w20 w21 w22 w23", "w30", "w40 w41 w42 w43 w44"]
SAMPLES = [[10, 11, 12, 13], [20, 21, 22, 23], [40, 41, 42, 43], [14, 15, 16, 17]]


def tokenizer_with_bos():
    """The tiny tokenizer, as Llama 3's and Gemma's: texts begin with BOS, here ``<eos>``, id 1."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def as_lines(documents) -> str:
    return "\n".join(json.dumps({"text": text}) for text in documents) + "\n"


def as_array(documents, indent=None) -> str:
    return json.dumps([{"text": text} for text in documents], indent=indent)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_lines(DOCUMENTS)),
        ("a.json", as_lines(DOCUMENTS)),
        ("a.json", as_array(DOCUMENTS)),
        ("a.json", as_array(DOCUMENTS, indent=1)),
        ("a.json", "\n \n" + as_array(DOCUMENTS, indent=2) + "\n"),
        ("a.jsonl", "\ufeff" + as_lines(DOCUMENTS)),
        ("a.json", "\ufeff" + as_array(DOCUMENTS)),
    ],
    ids=["lines", "lines in .json", "array", "indented", "blank lines", "BOM", "BOM and array"],
)
def test_files_that_are_read(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert text_dataset(path, tiny_tokenizer(), 10, 4)["input_ids"] == SAMPLES


def test_plain_text_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffw10 w11 w12 w13", encoding="utf-8")
    assert text_dataset(path, tiny_tokenizer(), 10, 4)["input_ids"] == [[10, 11, 12, 13]]


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('{"text": "w3"}\n{"text": null}\n', 2, "`text` is null"),
        ('{"text": "w3"}\n{"text": 5}\n', 2, "`text` is 5"),
        ('{"text": "w3"}\n\n"w3 w4"\n', 3, '"w3 w4" is not a JSON object'),
        ('{"text": "w3"}\n{"text": "w4"\n', 2, "not a JSON value on one line"),
        ('{\n "text": "w3"\n}\n', 1, "not a JSON value on one line"),
        ('[{"text": "w3"},\n {"text": "w4"}\n {"text": "w5"}]', 3, "not valid JSON"),
        ('[\n {"text": "w3"},\n\n {"text": null}\n]', 4, "`text` is null"),
        ('{"body": "w3"}\n', 1, "no field `text`"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path, content, line, problem):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=re.escape(f"{path}:{line}: ")) as error:
        text_dataset(path, tiny_tokenizer(), 10, 4)
    assert problem in str(error.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"w3 \xff\xfe w4")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        text_dataset(path, tiny_tokenizer(), 10, 1)


def test_reading_stops_when_there_is_enough(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(DOCUMENTS) + "this line would be refused\n")
    assert text_dataset(path, tiny_tokenizer(), 3, 4)["input_ids"] == SAMPLES[:3]


def test_samples_begin_with_bos_where_the_tokenizer_adds_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(DOCUMENTS[:2]))
    tokenizer = tokenizer_with_bos()
    expected = [[1, 10, 11, 12], [1, 20, 21, 22], [1, 13, 14, 15], [1, 16, 17, 18]]
    assert text_dataset(path, tokenizer, 10, 4)["input_ids"] == expected
    without = text_dataset(path, tokenizer, 10, 4, add_bos_token=False)["input_ids"]
    assert without == [[10, 11, 12, 13], [20, 21, 22, 23], [14, 15, 16, 17]]


def test_bos_can_be_asked_for(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("w10 w11 w12")
    tokenizer = tiny_tokenizer()
    with pytest.raises(CalibrationError, match="no BOS token"):
        text_dataset(path, tokenizer, 10, 4, add_bos_token=True)
    tokenizer.bos_token = "<eos>"
    assert text_dataset(path, tokenizer, 10, 4, add_bos_token=True)["input_ids"] == [
        [1, 10, 11, 12]
    ]


def test_generated_samples_begin_with_bos():
    samples = self_generated(tiny_llama(), tokenizer_with_bos(), 3, 8)["input_ids"]
    assert [len(sample) for sample in samples] == [8, 8, 8]
    assert all(sample[0] == 1 and sample[1] > 2 for sample in samples)


def words(start: int, count: int) -> str:
    return " ".join(f"w{start + index}" for index in range(count))


def test_text_takes_turns_between_documents(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [
        {"text": words(10, 9), "split": "calib"},
        {"text": words(30, 3), "split": "calib"},  # shorter than a sample
        {"text": words(50, 4), "split": "calib"},
        {"text": words(70, 8), "split": "eval"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = text_dataset(path, tiny_tokenizer(), 10, 4, split="calib")
    assert data["input_ids"] == [[10, 11, 12, 13], [50, 51, 52, 53], [14, 15, 16, 17]]
    assert data["attention_mask"] == [[1] * 4] * 3
    assert len(text_dataset(path, tiny_tokenizer(), 2, 4)) == 2


def test_plain_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(10, 6) + "\n\n" + words(16, 2))
    assert text_dataset(path, tiny_tokenizer(), 10, 4)["input_ids"] == [
        [10, 11, 12, 13],
        [14, 15, 16, 17],
    ]


def test_text_too_short(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(0, 3))
    with pytest.raises(CalibrationError, match=r"none of 1 documents has 4 tokens"):
        text_dataset(path, tiny_tokenizer(), 10, 4)


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
