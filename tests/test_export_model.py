"""A quantized model in memory is exported as its saved folder is."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from export_sources import quantized_model
from helpers import saved_tensors

from autoround_modifier import ExportError, OutputExistsError, export, load_model

W4 = (4, True, 32)


def same_folders(one, other) -> bool:
    first, second = saved_tensors(one), saved_tensors(other)
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
        and (one / "config.json").read_text() == (other / "config.json").read_text()
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_files_as_of_the_folder(symmetric, tmp_path):
    model = quantized_model((4, symmetric, 32), layers=2)
    exported = [
        export(model, format, tmp_path / "memory" / format, tokenizer=tiny_tokenizer())
        for format in ("gptq", "awq", "auto_round", "mlx")
    ]
    model.save_pretrained(tmp_path / "saved")
    for one in exported:
        export(tmp_path / "saved", one.format, tmp_path / "folder" / one.format)
        assert one.output == tmp_path / "memory" / one.format
        assert same_folders(one.output, tmp_path / "folder" / one.format)
        assert (one.output / "tokenizer.json").is_file()
    assert sorted(x.name for x in (tmp_path / "memory").iterdir()) == sorted(
        x.format for x in exported
    )
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_after_the_model_has_run_again(tmp_path):
    model = quantized_model(W4)
    export(model, "gptq", tmp_path / "first")
    model(torch.tensor([[1, 2, 3]]))
    export(model, "gptq", tmp_path / "second")
    assert same_folders(tmp_path / "first", tmp_path / "second")


def test_a_model_that_is_offloaded(tmp_path):
    from conftest import quantize, weight_scheme

    from autoround_modifier import AutoRoundModifier

    folder = tiny_llama(num_layers=1).config._name_or_path
    model = load_model(folder, device_map="auto_offload")
    modifier = AutoRoundModifier(
        config_groups={"group_0": weight_scheme(*W4)}, ignore=["lm_head"], preset="rtn"
    )
    export(quantize(model, modifier), "gptq", tmp_path / "offloaded")
    export(quantized_model(W4), "gptq", tmp_path / "in_memory")
    assert same_folders(tmp_path / "offloaded", tmp_path / "in_memory")


def test_the_tokenizer(tmp_path):
    """Of the model's folder, unless another is given."""
    model = quantized_model(W4)
    export(model, "gptq", tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer.json").is_file()
    other = tmp_path / "other"
    tiny_tokenizer(200).save_pretrained(other)
    export(model, "gptq", tmp_path / "named", tokenizer=str(other))
    named, own = ((tmp_path / x / "tokenizer.json").read_text() for x in ("named", "own"))
    assert '"w199"' in named
    assert '"w199"' not in own
    model.config._name_or_path = ""
    exported = export(model, "gptq", tmp_path / "none")
    assert "no tokenizer" in exported.notes[0]
    assert not (tmp_path / "none" / "tokenizer.json").exists()
    with pytest.raises(ExportError, match=r"tokenizer of .*nowhere cannot be loaded"):
        export(model, "gptq", tmp_path / "out", tokenizer=tmp_path / "nowhere")
    with pytest.raises(ExportError, match="goes with a model in memory"):
        export(tmp_path / "own", "gptq", tmp_path / "out", tokenizer=tiny_tokenizer())


def test_refusals_before_anything_is_saved(tmp_path, monkeypatch):
    model = quantized_model((2, True, 32))
    monkeypatch.setattr(model, "save_pretrained", lambda *_: pytest.fail("it was saved"))
    with pytest.raises(ExportError, match=r"(?s)exported to gptq, auto_round.*down_proj"):
        export(model, "awq", tmp_path / "out")
    with pytest.raises(ExportError, match="no quantized layer"):
        export(tiny_llama(num_layers=1), "gptq", tmp_path / "out")
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export(model, "gptq", tmp_path)
    with pytest.raises(OutputExistsError, match="is the folder of the checkpoint"):
        export(model, "gptq", model.config._name_or_path, overwrite=True)
    monkeypatch.delenv("LLAMA_CPP_ROOT", raising=False)
    with pytest.raises(ExportError, match="LLAMA_CPP_ROOT"):
        export(model, "gguf:q4_0", tmp_path / "model.gguf")
    assert [x.name for x in tmp_path.iterdir()] == ["note.txt"]


def test_a_compressed_model_is_refused_by_what_was_saved(tmp_path):
    model = quantized_model((2, True, 32))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ExportError, match=r"(?s)exported to gptq, auto_round.*down_proj"):
        export(model, "awq", tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["saved"]
