"""GGUF files of models that were tuned in types of GGUF, as gguf-py and Transformers read them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import gguf
import pytest
import torch
from conftest import quantize, tiny_llama
from helpers import saved_tensors
from llmcompressor.core import reset_session
from test_export_gguf import CONVERTER, NAMES, in_process
from test_gguf_tuning import tuner, weights_of_blocks
from transformers import AutoModelForCausalLM

from autoround_modifier import AutoRoundModifier, ExportError, OutputExistsError, export
from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks
from autoround_modifier.cli.main import main

__all__ = ["in_process"]
BF16, F32 = torch.bfloat16, torch.float32


@functools.cache
def tuned(scheme: str, hidden_size: int = 256, dtype: torch.dtype = F32) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tuned_"))
    model = tiny_llama(dtype, hidden_size=hidden_size)
    quantize(model, tuner(scheme, iters=1), output_dir=folder / "out")
    reset_session()
    return folder / "out"


def order_of(name: str, rows: int) -> torch.Tensor:
    """The converter puts the rows of a Llama's queries and keys in another order."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
    order = torch.arange(rows)
    return order if heads is None else order.view(heads, 2, -1).transpose(1, 2).reshape(-1)


@pytest.mark.parametrize(
    ("scheme", "hidden_size"),
    [("gguf:q2_k_s", 256), ("gguf:q3_k_m", 256), ("gguf:q4_k_m", 256), ("gguf:q5_k", 256),
     ("gguf:q4_k_m", 64)],
)  # fmt: skip
def test_the_file_has_the_tuned_weights(scheme, hidden_size, tmp_path, in_process):
    folder, file = tuned(scheme, hidden_size), tmp_path / "model.gguf"
    made = export(folder, scheme, file, llama_cpp=CONVERTER)
    types = SavedBlocks(folder).types
    assert (made.format, made.layers) == (scheme, 14)
    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, weight in weights_of_blocks(folder).items():
        layer, _, leaf = name.removeprefix("model.layers.").partition(".")
        tensor = found[f"blk.{layer}.{NAMES[leaf]}.weight"]
        assert tensor.tensor_type.name == types[name].upper()
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(read, weight[order_of(name, len(weight))]), name
    number = reader.fields["general.file_type"].contents()
    expected = {"gguf:q2_k_s": "Q2_K_S", "gguf:q3_k_m": "Q3_K_M", "gguf:q5_k": "Q5_K_S"}
    assert gguf.LlamaFileType(number).name == f"MOSTLY_{expected.get(scheme, 'Q4_K_M')}"


@pytest.mark.parametrize("scheme", ["gguf:q2_k_s", "gguf:q3_k_m", "gguf:q4_k_m"])
def test_transformers_gives_the_same_logits(scheme, tmp_path, in_process):
    folder = tuned(scheme)
    export(folder, "gguf:auto", tmp_path / "model.gguf", llama_cpp=CONVERTER)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=F32)
    ids = torch.arange(3, 20).unsqueeze(0)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=F32)
    assert torch.equal(loaded(ids).logits, saved(ids).logits)


def test_embeddings_are_rounded_if_asked(tmp_path, in_process):
    made = export(
        tuned("gguf:q4_k_m"), "gguf:q4_k_m", tmp_path / "a.gguf", llama_cpp=CONVERTER,
        embeddings="q6_k",
    )  # fmt: skip
    types = {x.name: x.tensor_type.name for x in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q6_K"
    assert made.notes == ()


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("gguf:q2_k", "was tuned in `gguf:q4_k_m`, and cannot be exported to `gguf:q2_k`"),
        ("gguf:q4_0", "export it to gguf:q4_k_m"),
        ("gptq", "export it to gguf:q4_k_m"),
    ],
)
def test_other_formats_are_refused(format, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(tuned("gguf:q4_k_m"), format, tmp_path / "model.gguf", llama_cpp=CONVERTER)


def test_other_checkpoints_are_refused(tmp_path):
    modifier = AutoRoundModifier(scheme="W4A16", iters=0, ignore=["lm_head"])
    quantize(tiny_llama(hidden_size=256), modifier, output_dir=tmp_path / "out")
    reset_session()
    with pytest.raises(ExportError, match="quantize the model with `scheme: gguf:q4_k_m`"):
        export(tmp_path / "out", "GGUF:Q4-K-M", tmp_path / "model.gguf", llama_cpp=CONVERTER)
    with pytest.raises(ExportError, match="GGUF is one file"):
        export(tuned("gguf:q4_k_m"), "gguf:q4_k_m", tmp_path, llama_cpp=CONVERTER)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(OutputExistsError):
        export(tuned("gguf:q4_k_m"), "gguf:q4_k_m", tmp_path / "model.gguf", llama_cpp=CONVERTER)


def test_by_the_command_line(tmp_path, capsys, in_process):
    folder, file = tuned("gguf:q4_k_m"), tmp_path / "model.gguf"
    before = saved_tensors(folder)
    command = ["export", str(folder), "gguf:q4_k_m", str(file), "--llama-cpp", str(CONVERTER)]
    assert main(command) == 0
    assert "14 layers in gguf:q4_k_m" in capsys.readouterr().out
    after = saved_tensors(folder)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
