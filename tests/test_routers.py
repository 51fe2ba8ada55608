"""Routers of experts keep their precision unless a target names them."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig
from conftest import VOCABULARY, quantize, weight_scheme
from helpers import quantized_layers
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.modifiers.routers import untargeted_routers
from autoround_modifier.modifiers.validation import layers_to_choose_for
from autoround_modifier.schemes import resolve_options

NAMES = ["mlp.gate", "mlp.shared_expert_gate", "router.proj", "dense.gate"]


def model() -> nn.Module:
    """Two routers beside experts, one by its name, and a gate that chooses nothing."""

    def linear() -> nn.Linear:
        return nn.Linear(128, 128)

    mlp = nn.Module()
    mlp.gate, mlp.shared_expert_gate = linear(), linear()
    mlp.experts = nn.ModuleList([linear()])
    router, dense, model = nn.Module(), nn.Module(), nn.Module()
    router.proj, dense.gate = linear(), linear()
    model.mlp, model.router, model.dense = mlp, router, dense
    return model


def untargeted(*targets: str, ignore: tuple[str, ...] = ()) -> list[str]:
    scheme = weight_scheme(targets=targets)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
    return untargeted_routers(model(), config)


@pytest.mark.parametrize("target", ["Linear", "re:.*", "re:.*mlp.*|re:.*proj"])
def test_routers_are_not_targeted_by_accident(target):
    found = untargeted(target)
    assert found[0] == "mlp.gate"
    assert "dense.gate" not in found
    if target == "Linear":
        assert found == NAMES[:3]


@pytest.mark.parametrize("target", ["mlp.gate", r"re:.*mlp\.gate$", "re:.*(gate|up).*"])
def test_a_target_that_names_a_router_wins(target):
    assert "mlp.gate" not in untargeted(target)
    assert "mlp.gate" not in untargeted("Linear", target)
    assert "mlp.gate" in untargeted("Linear", "re:.*gate_proj")


def test_ignored_routers_are_not_mentioned():
    assert untargeted("Linear", ignore=("re:.*gate",)) == ["router.proj"]


def test_auto_scheme_leaves_routers_alone():
    options = resolve_options(["W8A16", "FP8_DYNAMIC"])
    layers = layers_to_choose_for(model(), options, ["Linear"], [])
    assert set(layers) == {"mlp.experts.0", "dense.gate"}


@pytest.mark.parametrize("named", [False, True])
def test_a_mixture_of_experts(named, log, tmp_path):
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    moe = Qwen2MoeForCausalLM.from_pretrained(tmp_path)
    targets = ("Linear", "re:.*shared_expert_gate") if named else ("Linear",)
    scheme = weight_scheme(targets=targets)
    recipe = AutoRoundModifier(iters=1, ignore=["lm_head"], config_groups={"group_0": scheme})
    quantize(moe, recipe)
    name = "model.layers.0.mlp.shared_expert_gate"
    assert (name in quantized_layers(moe)) == named
    assert any("1 routers" in line and name in line for line in log) != named
