"""Exported GGUF files hold the tuner's weights, as gguf-py and Transformers read them."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_export import changed, tuned
from torch import Tensor
from transformers import AutoModelForCausalLM

from autoround_modifier import ExportError, OutputExistsError, export, quantized_weights
from autoround_modifier.exports.gguf_template import LLAMA_CPP
from autoround_modifier.exports.gguf_types import BLOCK_TYPES

CONVERTER = Path(__file__).parent / "fake_llama_cpp"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def in_process(monkeypatch):
    """The converter runs here, without the seconds that a new process takes to import PyTorch."""

    def run(command, **options):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            runpy.run_path(command[1], run_name="__main__")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)


class KnownTypes(int):
    """The types that gguf 0.19 knows, and Q2_0."""

    name = "Q2_0"

    def __new__(cls, number: int) -> Any:
        if number == 42:
            return super().__new__(cls, number)
        return gguf.GGMLQuantizationType(number)


for known in gguf.GGMLQuantizationType:
    setattr(KnownTypes, known.name, known)


def q2_0(blocks: np.ndarray, columns: int) -> np.ndarray:
    """``d * (u - 1)``: a float16 and 64 numbers of two bits, the lowest bits of a byte first."""
    blocks = blocks.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    numbers = np.stack([(blocks[:, 2:] >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    return (scale * (numbers.reshape(len(blocks), 64).astype(np.float32) - 1)).reshape(-1, columns)


def weights(path: Path) -> tuple[dict[str, np.ndarray], gguf.GGUFReader]:
    """:return: by name in GGUF, as float32"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gguf.GGML_QUANT_SIZES, 42, (64, 18))
        patch.setattr(gguf.gguf_reader, "GGMLQuantizationType", KnownTypes)
        reader = gguf.GGUFReader(path)
    found = {}
    for tensor in reader.tensors:
        if tensor.tensor_type == 42:
            found[tensor.name] = q2_0(tensor.data, int(tensor.shape[0]))
        else:
            found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found, reader


def dequantized(folder: Path) -> dict[str, Tensor]:
    """:return: by name of a layer, float32, by the integers and scales of the checkpoint"""
    result = {}
    for name, weight in quantized_weights(folder).items():
        scale, zero_point = (
            x.float().repeat_interleave(weight.grouping.group_size, 1)
            for x in (weight.scale, weight.zero_point)
        )
        result[name] = scale * (weight.values.float() - zero_point)
    return result


def permuted(weight: Tensor, heads: int) -> Tensor:
    """The order in which llama.cpp keeps rows of queries and keys: halves of a head interleaved."""
    rows = [
        head * 16 + half * 8 + i for head in range(heads) for i in range(8) for half in range(2)
    ]
    return weight[rows]


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric", "size"),
    [
        ("q2_0", 2, True, 64),
        ("q2_0", 2, True, None),
        ("q4_0", 2, True, 32),
        ("q4_0", 2, False, 32),
        ("q4_0", 3, True, None),
        ("q4_0", 3, False, 32),
        ("q4_0", 4, True, 32),
        ("q4_0", 4, True, 64),
        ("q5_0", 4, False, 32),
        ("q8_0", 4, False, None),
        ("q8_0", 8, True, 32),
    ],
)
def test_weights_are_the_tuners(in_process, kind, bits, symmetric, size, tmp_path):
    source, file = tuned((bits, symmetric, size)).folder, tmp_path / "model.gguf"
    exported = export(source, f"gguf:{kind}", file, llama_cpp=CONVERTER)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (exported.layers, exported.bytes) == (7, file.stat().st_size)
    found, reader = weights(file)
    types = {tensor.name: int(tensor.tensor_type) for tensor in reader.tensors}
    expected = dequantized(source)
    for name, weight in expected.items():
        inside = name.removeprefix("model.layers.0.")
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(inside)
        weight = weight if heads is None else permuted(weight, heads)
        known = f"blk.0.{NAMES[inside]}.weight"
        assert np.array_equal(found[known], weight.numpy()), name
        assert types[known] == BLOCK_TYPES[kind].number
    assert types["token_embd.weight"] == gguf.GGMLQuantizationType.BF16
    contents = {key: field.contents() for key, field in reader.fields.items()}
    assert contents["general.file_type"] == BLOCK_TYPES[kind].file_type
    assert contents["llama.attention.head_count_kv"] == 2
    assert contents["tokenizer.ggml.model"] == "none"
    assert contents["test.words"] == ["one", "", "three"]
    assert contents["test.numbers"] == [1.5, 2.5]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("q4_0", (3, False, 32)), ("q5_0", (4, False, 32)), ("q8_0", (8, True, 32))],
)
def test_transformers_computes_the_same(in_process, kind, scheme, tmp_path):
    source = tuned(scheme).folder
    export(source, f"gguf:{kind}", tmp_path / "model.gguf", llama_cpp=CONVERTER)
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, reference(ids).logits)


def test_mixed_bits_and_tied_embeddings(in_process, tmp_path):
    schemes = (2, True, 32, (r"re:.*mlp\..*_proj",)), (4, True, 64, (r"re:.*self_attn\..*_proj",))
    source = tuned(*schemes, tied=True).folder
    export(source, "gguf:q4_0", tmp_path / "model.gguf", llama_cpp=CONVERTER)
    found, _ = weights(tmp_path / "model.gguf")
    down = dequantized(source)["model.layers.0.mlp.down_proj"]
    assert np.array_equal(found["blk.0.ffn_down.weight"], down.numpy())
    assert "output.weight" not in found


def test_the_converter(tmp_path, monkeypatch):
    source, file = tuned((4, True, 32)).folder, tmp_path / "model.gguf"
    monkeypatch.delenv(LLAMA_CPP, raising=False)
    with pytest.raises(ExportError, match=r"git clone .* set LLAMA_CPP_ROOT"):
        export(source, "gguf:q4_0", file)
    with pytest.raises(ExportError, match="has no convert_hf_to_gguf"):
        export(source, "gguf:q4_0", file, llama_cpp=tmp_path)
    monkeypatch.setenv(LLAMA_CPP, str(CONVERTER))

    def of_another_kind(tensors, config):
        config["architectures"] = ["OtherForCausalLM"]

    other = changed(source, tmp_path / "other", of_another_kind)
    with pytest.raises(
        ExportError, match=r"(?s)does not convert.*OtherForCausalLM is not supported"
    ):
        export(other, "gguf:q4_0", file)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    export(source, "gguf:q4_0", file)


def test_a_converter_that_changes_weights(in_process, tmp_path):
    script = (CONVERTER / "convert_hf_to_gguf.py").read_text()
    changing = script.replace(
        " in self.tensors().items():",
        " in self.tensors().items():\n            tensor = 2 * tensor",
    )
    assert changing != script
    (tmp_path / "convert_hf_to_gguf.py").write_text(changing)
    with pytest.raises(ExportError, match="more than the order of its rows"):
        export(
            tuned((4, True, 32)).folder, "gguf:q4_0", tmp_path / "model.gguf", llama_cpp=tmp_path
        )
    assert [path.name for path in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]


def converter_of_words(folder: Path, model: str, count: int) -> Path:
    """:return: folder with a converter that writes a vocabulary"""
    script = (CONVERTER / "convert_hf_to_gguf.py").read_text()
    words = (
        f'add_tokenizer_model("{model}")\n'
        f"        self.gguf_writer.add_token_list([str(i) for i in range({count})])"
    )
    changed_script = script.replace('add_tokenizer_model("none")', words)
    assert changed_script != script
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(changed_script)
    return folder


def byte_level(folder: Path, source: Path) -> Path:
    """:return: a copy of the checkpoint with a tokenizer that splits text into bytes"""
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    steps = [{"type": "Digits"}, {"type": "ByteLevel"}]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_vocabulary_that_the_converter_mistakes(in_process, tmp_path):
    source, file = tuned((4, True, 32)).folder, tmp_path / "model.gguf"
    mistaken = converter_of_words(tmp_path / "mistaken", "llama", 128)
    export(source, "gguf:q4_0", file, llama_cpp=mistaken, overwrite=True)
    checkpoint = byte_level(tmp_path / "source", source)
    with pytest.raises(ExportError, match="would abort on the first text"):
        export(checkpoint, "gguf:q4_0", tmp_path / "x.gguf", llama_cpp=mistaken)
    assert not (tmp_path / "x.gguf").exists()

    right = converter_of_words(tmp_path / "right", "gpt2", 128)
    export(checkpoint, "gguf:q4_0", tmp_path / "words.gguf", llama_cpp=right)
    words = {"vocabulary": tmp_path / "words.gguf", "llama_cpp": mistaken, "overwrite": True}
    export(checkpoint, "gguf:q4_0", file, **words)
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 128

    failing = converter_of_words(tmp_path / "failing", "llama", 128)
    script = failing / "convert_hf_to_gguf.py"
    text = script.read_text().replace("add_tokenizer_model", "of_no_such_kind")
    script.write_text(text)
    export(checkpoint, "gguf:q4_0", file, **{**words, "llama_cpp": failing})
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.model"].contents() == "gpt2"
    with pytest.raises(AttributeError, match="of_no_such_kind"):
        export(checkpoint, "gguf:q4_0", file, llama_cpp=failing, overwrite=True)

    fewer = converter_of_words(tmp_path / "fewer", "gpt2", 100)
    export(checkpoint, "gguf:q4_0", tmp_path / "fewer.gguf", llama_cpp=fewer)
    words["vocabulary"] = tmp_path / "fewer.gguf"
    with pytest.raises(ExportError, match="has 100 tokens, and the model 128"):
        export(checkpoint, "gguf:q4_0", file, **words)
    with pytest.raises(ExportError, match="cannot be read as GGUF"):
        export(checkpoint, "gguf:q4_0", file, **{**words, "vocabulary": source / "config.json"})


def test_the_file(in_process, tmp_path):
    source = tuned((4, True, 32)).folder
    with pytest.raises(ExportError, match=r"ends in .gguf"):
        export(source, "gguf:q4_0", tmp_path / "out", llama_cpp=CONVERTER)
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export(source, "gguf:q4_0", file, llama_cpp=CONVERTER)
    export(source, "gguf:q4_0", file, llama_cpp=CONVERTER, overwrite=True)
    assert file.read_bytes().startswith(b"GGUF")
