"""host/lifecycle.py: modifiers, the sequential pipeline, recipes and hooks of LLM-Compressor."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import patch_attr
from conftest import tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from llmcompressor.modifiers import ModifierFactory
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from pydantic import PrivateAttr
from torch import nn
from torch.fx.proxy import TraceError
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import autoround_modifier
from autoround_modifier.host import lifecycle
from autoround_modifier.host.schemes import QuantizationArgs, QuantizationScheme


class Probe(lifecycle.PlainDataModifier):
    """Writes down what the pipeline calls, and what is so at that time."""

    requires_calibration_data: bool = True
    number: int = 0
    _events: list[str] = PrivateAttr(default_factory=list)
    _found: dict[str, Any] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state, **kwargs) -> bool:
        self._events.append("initialize")
        self._found |= {"arguments": kwargs, "batches": len(state.data.calib)}
        self._found["first batch"] = next(iter(state.data.calib))
        self._found["modifiers"] = lifecycle.recipe_modifiers()
        return True

    def on_calibration_start(self, state, event, **kwargs) -> None:
        self._events.append("calibration start")
        for block in state.model.model.layers:
            self.register_hook(block, self._block_ran, "forward", with_kwargs=True)

    def _block_ran(self, block, args, kwargs, output) -> None:
        if self._events[-1] != "block":
            self._events.append("block")
        self._found.setdefault("inputs", []).append(args[0])
        self._found["mask"] = kwargs["attention_mask"]

    def on_sequential_epoch_end(self, state, event, modules, **kwargs) -> None:
        blocks = [block for block in state.model.model.layers if block in modules]
        self._events.append(f"end of {len(blocks)} blocks")
        self._found |= {
            "attention": state.model.config._attn_implementation,
            "gradients": torch.is_grad_enabled(),
            "batch": state.current_batch_idx,
            "loss masks": state.loss_masks,
        }
        for block in blocks:
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.zero_()

    def on_calibration_end(self, state, event, **kwargs) -> None:
        self._events.append("calibration end")
        self.remove_hooks()
        self.ended_ = True

    def on_finalize(self, state, **kwargs) -> bool:
        self._events.append("finalize")
        return True


class NamedAlike(Probe):
    """Has the class name that the pipeline knows."""


NamedAlike.__name__ = lifecycle.AUTOROUND_CLASS_NAME


def run(probe: Probe, **arguments: Any) -> nn.Module:
    model = tiny_llama(dtype=torch.float32)
    return lifecycle.host_oneshot(
        model=model,
        recipe=probe,
        dataset=token_samples(4),
        processor=tiny_tokenizer(),
        shuffle_calibration_samples=False,
        **arguments,
    )


def test_order_of_events():
    probe = Probe()
    run(probe)
    assert probe._events == [
        "initialize",
        "calibration start",
        "end of 0 blocks",  # the embedding
        "block",
        "end of 1 blocks",
        "block",
        "end of 1 blocks",  # with the norm and the head
        "calibration end",
        "finalize",
    ]
    assert probe._found["modifiers"] == [probe]
    assert probe._found["arguments"]["sequential_targets"] is None
    assert probe._found["batches"] == 4
    assert probe._found["first batch"]["input_ids"].shape == (1, 12)
    assert not probe._found["gradients"]
    assert probe._found["batch"] == 3
    assert not probe._found["loss masks"]


def test_what_the_tracer_replaces_comes_back_where_it_fails(monkeypatch):
    names = HFTracer._TORCH_METHODS_TO_PATCH
    before = [getattr(torch, name) for name in names]

    def fail(*args, **kwargs):
        assert torch.finfo not in before
        raise TraceError("no control flow")

    monkeypatch.setattr(HFTracer, "create_arg", fail)
    with pytest.raises(Exception, match="no control flow"):
        run(Probe())
    assert [getattr(torch, name) for name in names] == before


def test_models_of_earlier_runs_are_freed():
    """The tracer keeps namespaces that hold modules; the session keeps the last model."""
    earlier = weakref.ref(run(Probe()))
    run(Probe())
    gc.collect()
    assert earlier() is None


def test_calibration_runs_in_eager_attention_with_masks(monkeypatch):
    """Whatever the model was loaded with."""
    probe, ran = Probe(), []

    def refuse(*args, **kwargs):
        ran.append("sdpa")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", refuse)
    model = run(probe)
    assert probe._found["attention"] == "eager"
    assert probe._found["mask"].shape == (1, 1, 12, 12)
    assert ran == []
    assert model.config._attn_implementation == "sdpa"


def second_inputs(probe: Probe, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """:return: what the first and the second block saw of the first sample"""
    run(probe, **arguments)
    return probe._found["inputs"][0], probe._found["inputs"][4]


def test_the_pipeline_goes_by_the_name_of_the_class():
    """After its turn the first block passes on its input, which the second one sees or not."""
    first, second = second_inputs(NamedAlike())
    assert not torch.equal(first, second)
    first, second = second_inputs(Probe())
    assert torch.equal(first, second)
    first, second = second_inputs(Probe(), propagate_error=False)
    assert not torch.equal(first, second)


def test_registered_modifiers_win_over_built_in_ones():
    ModifierFactory.refresh()
    name = "AutoRoundModifier"
    built_in = ModifierFactory._main_registry[name]
    assert built_in.__module__.startswith("llmcompressor.")
    found = ModifierFactory.create(name, True, True, scheme="W4A16")
    assert type(found) is autoround_modifier.AutoRoundModifier
    recipe = "s_stage:\n  s_modifiers:\n    AutoRoundModifier:\n      scheme: W4A16\n"
    (modifier,) = lifecycle.as_recipe(recipe).modifiers
    assert type(modifier) is autoround_modifier.AutoRoundModifier


def test_a_modifier_can_be_registered(monkeypatch):
    monkeypatch.setattr(ModifierFactory, "_registered_registry", {})
    lifecycle.register_modifier(Probe)
    recipe = lifecycle.Recipe.create_instance("s_stage:\n  s_modifiers:\n    Probe: {number: 3}\n")
    (modifier,) = recipe.modifiers
    assert (type(modifier), modifier.number) == (Probe, 3)


def test_names_of_modifiers():
    names = lifecycle.known_modifiers()
    assert names == sorted(names)
    assert {"GPTQModifier", "QuantizationModifier", "AutoRoundModifier"} <= set(names)
    assert {"AutoSchemeModifier", "ScaleDistillationModifier"} <= set(names)
    assert "Modifier" not in names


def test_recipes_in_all_their_forms(tmp_path):
    text = "s_stage:\n  s_modifiers:\n    QuantizationModifier: {scheme: W4A16}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    modifier = QuantizationModifier(scheme="W4A16")
    for recipe in (text, str(path), path, modifier, lifecycle.Recipe.create_instance(text)):
        (found,) = lifecycle.as_recipe(recipe).modifiers
        assert type(found) is QuantizationModifier
    assert lifecycle.as_recipe(modifier).modifiers[0] is modifier
    probe = Probe()
    assert lifecycle.as_recipe([modifier, probe]).modifiers == [modifier, probe]
    recipe = lifecycle.as_recipe(modifier)
    assert lifecycle.as_recipe(recipe) is recipe
    (found,) = lifecycle.Recipe.from_dict(yaml.safe_load(text)).modifiers
    assert type(found) is QuantizationModifier


def test_one_stage_of_a_recipe():
    text = "a_stage:\n  m_modifiers:\n    QuantizationModifier: {scheme: W4A16}\n"
    text += "b_stage:\n  m_modifiers:\n    QuantizationModifier: {scheme: W8A16}\n"
    schemes = [modifier.scheme for modifier in lifecycle.as_recipe(text).modifiers]
    assert schemes == ["W4A16", "W8A16"]
    (modifier,) = lifecycle.as_recipe(text, "b").modifiers
    assert modifier.scheme == "W8A16"


def test_fields_are_dumped_as_plain_data():
    class WithScheme(Probe):
        config_groups: dict[str, QuantizationScheme]

    args = QuantizationArgs(num_bits=4, scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    dumped = WithScheme(config_groups={"group_0": scheme}).model_dump()
    weights = dumped["config_groups"]["group_0"]["weights"]
    assert (weights["type"], weights["scale_dtype"]) == ("int", "torch.uint8")
    assert yaml.safe_load(yaml.safe_dump(dumped)) == dumped


def test_hooks_of_modifiers_can_be_disabled_and_removed():
    layer, probe, ran = nn.Linear(2, 2), Probe(), []
    probe.register_hook(layer, lambda module, args: ran.append(1), "forward_pre")
    layer(torch.ones(1, 2))
    with lifecycle.HooksMixin.disable_hooks():
        layer(torch.ones(1, 2))
    assert ran == [1]
    probe.remove_hooks()
    layer(torch.ones(1, 2))
    assert ran == [1]


class Quantizing(Probe, lifecycle.QuantizationMixin):
    """A modifier with schemes."""


def test_schemes_are_applied_calibrated_and_frozen():
    model = tiny_llama()
    groups = {"group_0": weight_scheme(4, group_size=32)}
    modifier = Quantizing(config_groups=groups, ignore=["lm_head"])
    assert list(modifier.resolved_config.config_groups) == ["group_0"]
    assert modifier.resolved_config.ignore == ["lm_head"]
    layer, head = model.model.layers[0].mlp.up_proj, model.lm_head
    assert not lifecycle.is_module_quantized(layer)

    lifecycle.QuantizationMixin.initialize_quantization(modifier, model)
    assert lifecycle.is_module_quantized(layer)
    assert not lifecycle.is_module_quantized(head)
    assert layer.quantization_scheme.weights.num_bits == 4
    assert layer.weight_scale.shape == layer.weight_zero_point.shape == (128, 2)
    assert (layer.weight_scale.dtype, layer.weight_zero_point.dtype) == (torch.bfloat16, torch.int8)
    assert not layer.quantization_enabled

    lifecycle.apply_calibration_status(layer)
    assert layer.quantization_status == QuantizationStatus.CALIBRATION
    lifecycle.QuantizationMixin.end_calibration(modifier, model)
    assert layer.quantization_status == QuantizationStatus.FROZEN
    assert layer.quantization_enabled
    layer.apply(lifecycle.disable_quantization)
    assert not layer.quantization_enabled


def test_quantization_can_be_switched_off_for_a_while():
    layer = nn.Linear(4, 2)
    layer.quantization_scheme, layer.quantization_enabled = object(), True
    with lifecycle.DisableQuantization(nn.Sequential(layer)):
        assert not layer.quantization_enabled
    assert layer.quantization_enabled


def test_evaluation_mode_for_a_while():
    model = nn.Sequential(nn.Dropout())
    assert model.training
    with lifecycle.eval_context(model):
        assert not model[0].training
    assert model.training
    assert model[0].training


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attributes_can_be_patched(implementation):
    config = tiny_llama().config
    with patch_attr(config, "_attn_implementation", implementation):
        assert config._attn_implementation == implementation
    assert config._attn_implementation == "sdpa"


def test_embeddings():
    model = tiny_llama(tied=True)
    embedding, head = model.model.embed_tokens, model.lm_head
    block = ("model.layers.0", model.model.layers[0])
    assert lifecycle.targets_embeddings(model, iter([block, ("lm_head", head)]))
    assert lifecycle.targets_embeddings(model, iter([("model.embed_tokens", embedding)]))
    assert not lifecycle.targets_embeddings(model, iter([block]))
    assert embedding.weight is head.weight
    lifecycle.untie_word_embeddings(model)
    assert embedding.weight.data_ptr() != head.weight.data_ptr()
    assert torch.equal(embedding.weight, head.weight)
    assert not model.config.tie_word_embeddings


def test_blocks_that_a_model_declares():
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        model = LlamaForCausalLM(config)
    assert set(lifecycle.infer_sequential_targets(model, None)) == {"LlamaDecoderLayer"}
    assert lifecycle.infer_sequential_targets(model, ["LlamaMLP"]) == ["LlamaMLP"]
