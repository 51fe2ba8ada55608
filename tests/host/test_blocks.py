"""host/blocks.py: which modules of a model are its blocks."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import tiny_llama
from torch import nn

from autoround_modifier.errors import RecipeError
from autoround_modifier.host.blocks import declare_blocks, find_blocks
from autoround_modifier.host.lifecycle import infer_sequential_targets

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def built(name: str, **fields) -> nn.Module:
    """A model of Transformers without weights, by the prefix of its classes."""
    prefix, kind = name.split(".")
    config = getattr(transformers, f"{prefix}Config")(**{**SMALL, **fields})
    with torch.device("meta"):
        return getattr(transformers, prefix + kind)(config)


def found(model: nn.Module, targets: list[str] | None = None) -> dict[str, str]:
    """:return: name -> class of the blocks"""
    return {name: type(x).__name__ for x, name in find_blocks(model, targets).items()}


@pytest.mark.parametrize(
    "targets",
    [
        None,
        "LlamaDecoderLayer",
        ["LlamaDecoderLayer"],
        [r"re:.*layers\.\d+$"],
        ["re:.*layers.*"],
        ["LlamaDecoderLayer", "LlamaMLP"],
    ],
)
def test_blocks_of_llama(targets):
    llama = tiny_llama()
    blocks = find_blocks(llama, targets)
    assert list(blocks.values()) == ["model.layers.0", "model.layers.1"]
    assert list(blocks) == list(llama.model.layers)


def test_the_outermost_of_nested_classes_that_a_model_declares():
    mamba = built("Mamba.ForCausalLM", state_size=4)
    assert {"MambaBlock", "MambaMixer"} <= set(infer_sequential_targets(mamba))
    names = ["backbone.layers.0", "backbone.layers.1"]
    assert found(mamba) == dict.fromkeys(names, "MambaBlock")
    assert found(mamba, ["MambaMixer", "MambaBlock"]) == dict.fromkeys(names, "MambaBlock")
    assert list(found(mamba, ["MambaMixer"])) == [f"{name}.mixer" for name in names]
    mbart = built("MBart.ForCausalLM", d_model=32, decoder_layers=2, decoder_ffn_dim=32)
    assert set(found(mbart).values()) == {"MBartDecoderLayer"}


def test_a_module_that_holds_a_list_of_blocks_is_none():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(3))

    class Model(nn.Module):
        _no_split_modules = ("Tower", "TransformerEncoderLayer")

        def __init__(self):
            super().__init__()
            self.tower = Tower()

    assert list(found(Model())) == ["tower.blocks.0", "tower.blocks.1", "tower.blocks.2"]


def test_embeddings_that_a_model_declares_are_no_blocks():
    bert = built("Bert.Model")
    assert "BertEmbeddings" in infer_sequential_targets(bert)
    assert set(found(bert).values()) == {"BertLayer"}


def test_members_of_a_list_stand_for_their_parts():
    model = built("RobertaPreLayerNorm.Model")
    assert "RobertaPreLayerNormSelfAttention" in infer_sequential_targets(model)
    assert set(found(model).values()) == {"RobertaPreLayerNormLayer"}


def test_the_lists_of_a_model_that_declares_nothing(log):
    model = built("BioGpt.ForCausalLM")
    assert found(model) == dict.fromkeys(
        ["biogpt.layers.0", "biogpt.layers.1"], "BioGptDecoderLayer"
    )
    (warning,) = [line for line in log if "does not say what its blocks are" in line]
    assert warning.startswith("WARNING ")
    assert "biogpt.layers (2 BioGptDecoderLayer)" in warning
    assert found(built("XLNet.Model", d_model=32, n_layer=2, n_head=2))


def test_lists_of_layers_are_no_lists_of_blocks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
            self.mixed = nn.ModuleList([nn.TransformerEncoderLayer(8, 2), nn.Linear(4, 4)])

    assert found(Model()) == {}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["LlamaDecoderlayer"], r"match no module; did you mean `LlamaDecoderLayer`"),
        (["Zamba"], "match no module.*blocks of this model are LlamaDecoderLayer"),
        (["Linear"], r"self_attn.q_proj.* \(single layers, not blocks\).*LlamaDecoderLayer"),
        (["LlamaRMSNorm"], "single layers"),
        (["LlamaDecoderLayer", "Linear"], r"match lm_head \(single layers"),
        (["model.layers"], r"match model.layers \(lists, not blocks\)"),
        (["LlamaModel"], r"match model \(holds the embeddings"),
        (["re:.*"], "match the model itself"),
    ],
)
def test_what_is_no_block_is_refused(targets, message):
    with pytest.raises(RecipeError, match=message):
        find_blocks(tiny_llama(), targets)


def test_one_of_several_targets_that_matches_nothing_is_said(log):
    assert len(find_blocks(tiny_llama(), ["LlamaDecoderLayer", "LlamaMLp"])) == 2
    assert any("['LlamaMLp'] match no module; did you mean `LlamaMLP`" in line for line in log)


@pytest.mark.parametrize("name", ["BioGpt.ForCausalLM", "RobertaPreLayerNorm.Model"])
def test_the_pipeline_is_told_where_it_would_take_others(name):
    model = built(name)
    blocks = find_blocks(model, None)
    declare_blocks(model, blocks)
    assert infer_sequential_targets(model) == {type(next(iter(blocks))).__name__}
    assert find_blocks(model, None) == blocks


@pytest.mark.parametrize("name", ["Llama.ForCausalLM", "Mamba.ForCausalLM", "Bert.Model"])
def test_a_model_that_says_it_right_is_left_alone(name):
    model = built(name)
    before = model._no_split_modules
    declare_blocks(model, find_blocks(model, None))
    assert model._no_split_modules is before


def test_blocks_of_one_class_among_others_are_declared_by_name():
    class Inner(nn.TransformerEncoderLayer):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.single = Inner(8, 2)
            self.layers = nn.ModuleList(Inner(8, 2) for _ in range(2))

    model = Model()
    declare_blocks(model, find_blocks(model, None))
    assert set(infer_sequential_targets(model)) == {"layers.0", "layers.1"}
