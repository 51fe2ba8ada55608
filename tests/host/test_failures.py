"""host/failures.py: errors of LLM-Compressor in words."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo  # loaded while a model is traced, it would know patched functions only
from conftest import quantize, tiny_llama, weight_scheme
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from tiny_mixtures import tiny_mixture

from autoround_modifier import AutoRoundModifier, RecipeError
from autoround_modifier.host.failures import explain_failure


def test_a_model_that_cannot_be_traced_is_refused_with_the_remedy(monkeypatch):
    model = tiny_llama()
    original = type(model.model).forward

    def forward(self, input_ids=None, **kwargs):
        if torch.fx._symbolic_trace.is_fx_tracing():
            raise TypeError("cannot be traced")
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", forward)
    recipe = AutoRoundModifier(iters=2, config_groups={"group_0": weight_scheme(4)})
    with pytest.raises(RecipeError, match=r'LlamaForCausalLM .*Pass `pipeline="basic"`') as caught:
        quantize(model, recipe)
    assert "fx.wrap" not in str(caught.value)


def test_experts_that_cannot_be_separated_are_named(tmp_path, monkeypatch):
    def refuse(*args):
        raise AttributeError("no attribute `moe_intermediate_size`")

    monkeypatch.setattr(LinearExperts2D, "from_experts_module", refuse)
    with pytest.raises(RecipeError, match="separate the experts of Qwen3MoeForCausalLM") as caught:
        quantize(
            tiny_mixture(tmp_path, split=False),
            AutoRoundModifier(preset="rtn", config_groups={"group_0": weight_scheme(4)}),
        )
    assert "moe_intermediate_size" in str(caught.value)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(ValueError, match="something else") as caught:
        raise ValueError("something else")
    assert explain_failure(caught.value, "a model") is None
