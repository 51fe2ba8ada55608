"""Experts of mixtures that are tuned in types of GGUF: types, saved weights, exported files."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import gguf
import pytest
import torch
from conftest import quantize
from helpers import saved_tensors
from llmcompressor.core import reset_session
from test_export_gguf import CONVERTER, in_process
from test_gguf_tuning import tuner, weights_of_blocks
from tiny_mixtures import DEEPSEEK, tiny_mixture
from transformers import AutoModelForCausalLM, DeepseekV3Config

from autoround_modifier import AutoRoundModifier, export, inspect_checkpoint, plan
from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks
from autoround_modifier.errors import RecipeError, SchemeError
from autoround_modifier.gguf_schemes import ModelFacts, layer_types
from autoround_modifier.report.schema import read_report

__all__ = ["in_process"]
# Features that super-blocks divide
WIDE = {"hidden_size": 256, "intermediate_size": 256}
FIELDS = {
    "Qwen3Moe": WIDE | {"moe_intermediate_size": 256},
    "Qwen2Moe": WIDE
    | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    | {"num_hidden_layers": 1},
    "Mixtral": WIDE | {"num_local_experts": 8},
}
PARTS = ("gate", "up", "down")


@functools.cache
def tuned(scheme: str, prefix: str = "Qwen3Moe") -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tuned_"))
    model = tiny_mixture(folder / "original", prefix, **FIELDS[prefix])
    # The search for scales takes a tenth of a second for each layer
    preset = {"iters": 1} if prefix == "Qwen3Moe" else {"preset": "rtn"}
    modifier = AutoRoundModifier(scheme=scheme, ignore=["lm_head"], **preset)
    quantize(model, modifier, output_dir=folder / "out")
    reset_session()
    return folder / "out"


# ------------------------------------------------------------------------------- types


def types_of(
    scheme: str, leaf: str, blocks: int, experts: int, queries_per_key: int = 4, dense: int = 0
) -> str:
    """
    One digit for each block: the bits of the layers of that name, which all experts share.

    :param dense: blocks at the start that are no mixtures
    """
    parts = [f"self_attn.{x}_proj" for x in "qkvo"]
    found = []
    names = [
        f"model.layers.{block}.{part}"
        for block in range(blocks)
        for part in (
            *parts,
            *(f"mlp.shared_expert.{x}_proj" for x in PARTS),
            *(
                [f"mlp.{x}_proj" for x in PARTS]
                if block < dense
                else [f"mlp.experts.{number}.{x}_proj" for number in range(experts) for x in PARTS]
            ),
        )
    ]
    types = layer_types(scheme, names, ModelFacts(queries_per_key, experts=experts))
    for block in range(blocks):
        inside = f"model.layers.{block}."
        kinds = {types[x] for x in names if x.startswith(inside) and x.endswith(leaf)}
        assert len(kinds) == 1
        found.append(kinds.pop()[1])
    return "".join(found)


def test_mixtures_of_eight_experts_are_those_of_llama_cpp():
    """What `llama_model_quantize` of llama-cpp-python 0.3.36 gives a Mixtral of 32 blocks."""
    more = "66664464464464464464464464466666"
    for scheme in ("gguf:q2_k_s", "gguf:q3_k_m", "gguf:q4_k_m"):
        for leaf in ("k_proj", "v_proj"):
            assert types_of(scheme, leaf, 32, 8) == 32 * "8"
    for leaf in ("q_proj", "gate_proj", "up_proj"):
        assert types_of("gguf:q4_k_m", leaf, 32, 8) == 32 * "4"
    assert types_of("gguf:q4_k_m", "down_proj", 32, 8) == more
    assert types_of("gguf:q4_k_m", "o_proj", 32, 8) == 32 * "5"
    assert types_of("gguf:q3_k_m", "down_proj", 32, 8) == "55" + 30 * "4"
    assert types_of("gguf:q3_k_m", "o_proj", 32, 8) == 32 * "5"
    assert types_of("gguf:q2_k_s", "down_proj", 32, 8) == 4 * "4" + 28 * "2"
    assert types_of("gguf:q2_k_s", "o_proj", 32, 8) == 32 * "2"


def test_other_mixtures_are_those_of_llama_cpp():
    """`down_proj` by the number of the block: of experts, shared experts and blocks without."""
    assert types_of("gguf:q4_k_m", "down_proj", 16, 16) == "6644644644644666"
    assert types_of("gguf:q4_k_m", "down_proj", 16, 16, dense=3) == "6644644644644666"
    assert types_of("gguf:q4_k_m", "v_proj", 16, 16) == "6644644644644666"
    assert types_of("gguf:q4_k_m", "k_proj", 16, 16) == 16 * "4"
    assert types_of("gguf:q4_k_m", "o_proj", 16, 16) == 16 * "4"
    assert types_of("gguf:q3_k_m", "o_proj", 16, 16) == 16 * "4"
    assert types_of("gguf:q2_k_s", "down_proj", 16, 16, dense=1) == "44" + 14 * "2"
    assert types_of("gguf:q2_k_s", "v_proj", 16, 16, queries_per_key=2) == 16 * "2"


def test_a_single_type_is_that_of_mixtures_too():
    for leaf in ("v_proj", "down_proj", "o_proj"):
        assert types_of("gguf:q3_k", leaf, 8, 8) == 8 * "3"


# ------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("prefix", "scheme", "layers"),
    [
        ("Qwen3Moe", "gguf:q2_k_s", 32),
        ("Mixtral", "gguf:q4_k_m", 56),
        ("Qwen2Moe", "gguf:q3_k_m", 19),
    ],
)
def test_saved_weights_are_those_of_the_blocks(prefix, scheme, layers):
    folder = tuned(scheme, prefix)
    found, tensors = weights_of_blocks(folder), saved_tensors(folder)
    assert len(found) == layers
    for name, weight in found.items():
        assert torch.equal(tensors[f"{name}.weight"], weight.to(torch.bfloat16)), name
    original = saved_tensors(folder.parent / "original")
    left = {name for name in tensors if name.removesuffix(".weight") not in found}
    assert any(name.endswith("gate.weight") for name in left)
    assert all(torch.equal(tensors[name], original[name]) for name in left)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert loaded(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_types_of_a_tuned_mixtral():
    types = SavedBlocks(tuned("gguf:q4_k_m", "Mixtral")).types
    inside = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    for expert in range(8):
        found = [types[inside.format(block, expert, "w2")] for block in range(2)]
        assert found == ["q4_k", "q6_k"]
        assert types[inside.format(1, expert, "w1")] == "q4_k"
    attention = [types[f"model.layers.0.self_attn.{x}_proj"] for x in "qkvo"]
    assert attention == ["q4_k", "q8_0", "q8_0", "q5_k"]


@pytest.mark.parametrize("scheme", ["gguf:q2_k_s", "gguf:q4_k_m"])
def test_the_file_has_the_tuned_experts(scheme, tmp_path, in_process):
    folder, file = tuned(scheme), tmp_path / "model.gguf"
    assert export(folder, scheme, file, llama_cpp=CONVERTER).layers == 32
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights, types = weights_of_blocks(folder), SavedBlocks(folder).types
    for block in range(2):
        for part in PARTS:
            tensor = found[f"blk.{block}.ffn_{part}_exps.weight"]
            read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert read.shape == (4, 256, 256)
            for expert in range(4):
                name = f"model.layers.{block}.mlp.experts.{expert}.{part}_proj"
                assert torch.equal(read[expert], weights[name]), name
                assert tensor.tensor_type.name == types[name].upper()
        assert found[f"blk.{block}.ffn_gate_inp.weight"].tensor_type.name == "BF16"


def test_experts_may_be_left_out(tmp_path, in_process):
    model = tiny_mixture(tmp_path / "original", **FIELDS["Qwen3Moe"])
    ignore = ["lm_head", "re:.*experts.*gate_proj"]
    quantize(
        model,
        AutoRoundModifier(scheme="gguf:q4_k", preset="rtn", ignore=ignore),
        output_dir=tmp_path / "out",
    )
    made = export(tmp_path / "out", "gguf:q4_k", tmp_path / "a.gguf", llama_cpp=CONVERTER)
    assert made.layers == 24
    types = {x.name: x.tensor_type.name for x in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["blk.0.ffn_gate_exps.weight"] == "BF16"
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_K"


# ------------------------------------------------------------------------------- refusals


def test_some_experts_of_a_block_are_refused(tmp_path, monkeypatch):
    model = tiny_mixture(tmp_path, **FIELDS["Qwen3Moe"])
    monkeypatch.setattr(type(model), "forward", None)
    ignore = ["lm_head", "model.layers.1.mlp.experts.3.up_proj"]
    with pytest.raises(SchemeError, match=r"one tensor.*left out: model.layers.1.*0.up_proj.*2.up"):
        quantize(model, tuner("gguf:q4_k", ignore=ignore))


def test_experts_that_no_converter_would_find_are_refused(tmp_path, monkeypatch):
    """The release of Granite-MoE has one tensor, and files here would have one of each expert."""
    model = tiny_mixture(tmp_path, "GraniteMoe", **WIDE)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(RecipeError, match="experts of this architecture from one tensor") as error:
        quantize(model, tuner("gguf:q4_k"))
    assert "engine" not in str(error.value)


def test_latent_attention_is_refused_where_the_converter_splits_it():
    config = DeepseekV3Config(**DEEPSEEK)
    ignore = ["lm_head"]
    with pytest.raises(SchemeError, match=r"splits them.*: model.layers.0.self_attn.kv_b_proj"):
        plan(config, AutoRoundModifier(scheme="gguf:q4_k_m", ignore=ignore))
    ignore.append("re:.*kv_b_proj")
    planned = plan(config, AutoRoundModifier(scheme="gguf:q4_k_m", ignore=ignore))
    assert any(part.name == "routed experts" for part in planned.counts.parts)


# ------------------------------------------------------------------------------- what is said


def test_report_inspection_and_plan():
    folder = tuned("gguf:q4_k_m", "Mixtral")
    labels = {layer.name: layer.scheme for layer in read_report(folder).layers}
    assert len(labels) == 56
    assert labels["model.layers.0.mlp.experts.7.down_proj"] == "GGUF Q4_K"
    assert labels["model.layers.1.mlp.experts.7.down_proj"] == "GGUF Q6_K"
    found = inspect_checkpoint(folder, "cpu")
    assert found.contents.gguf_types == {"q4_k": 42, "q8_0": 4, "q5_k": 2, "q6_k": 8}
    assert sum(layer.experts for layer in found.contents.gguf_layers) == 48
    assert found.loads("any")
    supports = {x.engine: x for x in found.here}
    assert supports["llama.cpp"].loads
    config = AutoModelForCausalLM.from_pretrained(folder.parent / "original").config
    planned = plan(config, scheme="gguf:q4_k_m", iters=2)
    saved = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert planned.checkpoint.value == pytest.approx(saved, rel=0.02)
    (experts,) = (part for part in planned.counts.parts if part.name == "routed experts")
    assert experts.scheme == "GGUF Q4_K"
    blocks = SavedBlocks(folder)
    sizes = {name: blocks.blocks(name).nbytes for name in blocks.types}
    own = [size + 2 * 256 * 256 for name, size in sizes.items() if ".experts." in name]
    assert experts.saved == sum(own)
    (beside,) = (x.value for x in planned.host if x.name.startswith("blocks of GGUF"))
    assert beside == sum(sizes.values())
