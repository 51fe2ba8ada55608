"""Routers of experts keep their precision unless a target names them."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig
from conftest import VOCABULARY, quantize, weight_scheme
from helpers import quantized_layers
from tiny_mixtures import tiny_mixture
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from autoround_modifier import AutoRoundModifier, RecipeError
from autoround_modifier.modifiers.routers import ignored_layers, untargeted_routers
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


class Chooses(nn.Linear):
    """Like `PhimoeTopKRouter`."""

    def forward(self, x):
        return super().forward(x).topk(2)


class ByGroups(nn.Linear):
    """Like `DeepseekV4GroupedLinear`."""

    def forward(self, x):
        return super().forward(x.view(*x.shape[:-2], -1))


class Plain(nn.Linear):
    """Like `FalconLinear`."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_classes_that_compute_something_else_stay_as_they_are(log):
    odd = nn.ModuleDict(
        {"chooses": Chooses(64, 4), "by_groups": ByGroups(64, 64), "plain": Plain(64, 64)}
    )
    scheme = weight_scheme(targets=["Linear", "re:.*chooses"])
    config = QuantizationConfig(config_groups={"group_0": scheme})
    assert ignored_layers(odd, config) == ["chooses", "by_groups"]
    (warning,) = (line for line in log if line.startswith("WARNING"))
    assert "(ByGroups, Chooses) is derived from Linear and computes something else" in warning


def test_experts_that_do_not_run_are_refused(tmp_path, monkeypatch):
    mixture = tiny_mixture(tmp_path)

    def fail(x):
        raise AttributeError("no attribute `swiglu_alpha`")

    monkeypatch.setattr(mixture.model.layers[0].mlp.experts[0], "_apply_gate", fail)
    with pytest.raises(RecipeError, match=r"mlp\.experts: LLM-Compressor does not know .*swiglu"):
        quantize(mixture, AutoRoundModifier(iters=2, config_groups={"group_0": weight_scheme(4)}))


def test_a_model_of_conv1d_is_refused_by_name():
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    recipe = AutoRoundModifier(
        iters=2, ignore=["lm_head"], config_groups={"group_0": weight_scheme(4)}
    )
    with pytest.raises(RecipeError, match="class Conv1D of Transformers, which compressed-tensors"):
        quantize(GPT2LMHeadModel(config), recipe)
