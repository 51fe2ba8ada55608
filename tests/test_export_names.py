"""Names of layers in the configs of other formats: what loaders match, and what they must not."""

from __future__ import annotations

import re

import pytest
from export_sources import config_of, spec
from tiny_mixtures import tiny_mixture

from autoround_modifier import AutoRoundModifier, ExportError, export
from autoround_modifier.engines.layout import TensorLayout
from autoround_modifier.exports.auto_round_format import auto_round_config
from autoround_modifier.exports.awq import awq_config
from autoround_modifier.exports.export_formats import FORMATS, check_format
from autoround_modifier.exports.gptq import gptq_config, gptq_notes
from autoround_modifier.exports.integer_specs import unquantized_layers
from autoround_modifier.exports.layer_names import expressions
from autoround_modifier.host.saved_names import saved_name

TEXT = "model.language_model.layers"
VISION = "model.vision_tower.encoder.layers"


def left_out(config: dict, name: str) -> bool:
    """What GPTQModel, vLLM and SGLang do with `dynamic`."""
    return any(
        re.match(key.removeprefix("-:"), name)
        for key in config.get("dynamic", {})
        if key.startswith("-:")
    )


@pytest.mark.parametrize("prefix", ["model.language_model", "language_model.model", "model"])
def test_any_prefix_matches(prefix):
    """vLLM moves the prefixes of models with vision encoders."""
    layers = [spec(name=f"{TEXT}.{i}.self_attn.q_proj") for i in range(2)]
    config = gptq_config(layers, [f"{TEXT}.{i}.mlp.down_proj" for i in range(2)])
    assert left_out(config, f"{prefix}.layers.1.mlp.down_proj")
    assert not left_out(config, f"{prefix}.layers.1.self_attn.q_proj")
    assert not left_out(config, f"{prefix}.layers.11.mlp.down_proj")


def test_the_prefix_stays_where_it_tells_layers_apart():
    layers = [spec(name=f"{TEXT}.{i}.self_attn.q_proj") for i in range(2)]
    config = gptq_config(layers, [f"{VISION}.{i}.self_attn.q_proj" for i in range(2)])
    assert left_out(config, f"{VISION}.1.self_attn.q_proj")
    assert not left_out(config, f"{TEXT}.1.self_attn.q_proj")
    assert "modules_in_block_to_quantize" not in config
    (one,) = expressions(["a.layers.0.x"], ["b.layers.0.x"])
    assert one == r"^a\.layers\.(?:0)\.(?:x)$"


def test_layers_that_transformers_takes_for_quantized():
    """optimum compares the ends of names."""
    layers = [spec(name="model.layers.0.mlp.up_proj")]
    skipped = ["model.layers.0.shared_mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert gptq_config(layers, skipped)["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    (note,) = gptq_notes(layers, skipped)
    assert "Transformers would take model.layers.0.shared_mlp.up_proj for quantized" in note
    assert gptq_notes(layers, skipped[1:]) == []


def test_a_name_that_is_a_part_of_another_in_auto_round():
    """auto-round takes names that are of no linear layer for expressions."""
    layers = [spec(name="model.layers.0.mlp.gate_proj")]
    config = auto_round_config(layers, ["model.layers.0.mlp.gate", "model.layers.0.mlp.up_proj"])
    entry = {"bits": 16, "data_type": "float"}
    gate = r"^model\.layers\.0\.mlp\.gate$"
    assert config["extra_config"] == {gate: entry, "model.layers.0.mlp.up_proj": entry}


# ---------------------------------------------------------------------- experts


def test_experts_that_are_not_quantized_have_the_name_of_their_module():
    """Engines know all experts of a block as one layer; some models store them in one tensor."""
    shapes = {
        "model.layers.0.mlp.experts.0.up_proj.weight": (64, 64),
        "model.layers.0.mlp.experts.1.up_proj.weight": (64, 64),
        "model.layers.1.mlp.experts.gate_up_proj": (2, 64, 64),
        "model.layers.1.mlp.experts.gate_up_proj_bias": (2, 64),
        "model.layers.1.mlp.shared_experts.up_proj.weight": (64, 64),
        "model.layers.1.mlp.gate.weight": (2, 64),
        "model.layers.1.norm.weight": (64,),
        "model.embed_tokens.weight": (64, 64),
    }
    tensors = {name: TensorLayout(shape, None) for name, shape in shapes.items()}
    assert unquantized_layers(tensors, ()) == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.shared_experts.up_proj",
        "model.layers.1.mlp.gate",
    ]


@pytest.mark.parametrize("format", ["gptq", "awq", "auto_round"])
def test_a_mixture_whose_attention_alone_is_quantized(format, tmp_path):
    from conftest import quantize, weight_scheme

    modifier = AutoRoundModifier(
        config_groups={"group_0": weight_scheme(4, True, 32, [r"re:.*self_attn\..*_proj"])},
        ignore=["lm_head"],
        preset="rtn",
        engine="vllm",
    )
    model = quantize(tiny_mixture(tmp_path / "mixture", "Mixtral"), modifier)
    export(model, format, tmp_path / "out")
    section = config_of(tmp_path / "out")["quantization_config"]
    modules = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    saved = [saved_name(model)(f"{name}.0.w1").removesuffix(".0.w1") for name in modules]
    assert saved
    for module in saved:
        for name in (module, f"{module}.0.w1"):
            assert is_left_out(section, format, name), name
    assert not is_left_out(section, format, "model.layers.0.self_attn.q_proj")


def is_left_out(section: dict, format: str, name: str) -> bool:
    if format == "awq":
        return any(part in name for part in section["modules_to_not_convert"])
    if format == "gptq":
        return left_out(section, name)
    return any(key == name or re.search(key, name) for key in section["extra_config"])


# ---------------------------------------------------------------------- refused by name


@pytest.mark.parametrize("format", ["gptq", "awq", "auto_round", "mlx"])
def test_quantized_experts(format):
    experts = spec(name="model.layers.0.mlp.experts.3.up_proj", kind="expert")
    with pytest.raises(ExportError, match=r"experts of a mixture .*experts\.3\.up_proj"):
        check_format(FORMATS[format], [experts], [])


@pytest.mark.parametrize("kind", ["head", "embedding"])
@pytest.mark.parametrize("format", ["gptq", "awq", "auto_round"])
def test_quantized_heads_and_embeddings(format, kind):
    name = {"head": "lm_head", "embedding": "model.embed_tokens"}[kind]
    with pytest.raises(ExportError, match=rf"(?s)exported to mlx.*quantized {kind}.*: {name}"):
        check_format(FORMATS[format], [spec(name=name, kind=kind)], [])


@pytest.mark.parametrize("format", ["gptq", "awq", "auto_round"])
@pytest.mark.parametrize("bits", [3, 4])
def test_features_that_do_not_fill_words(format, bits):
    with pytest.raises(ExportError, match="80 x 64 features, which must be multiples of 32"):
        check_format(FORMATS[format], [spec(num_bits=bits, out_features=80)], [])


def test_awq_takes_fused_layers_and_the_head_as_left_out():
    config = awq_config([spec()], ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"])
    assert "model.layers.0.mlp.gate_up_proj" in config["modules_to_not_convert"]
    assert "lm_head" in config["modules_to_not_convert"]
