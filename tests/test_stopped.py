"""Ctrl-C and errors: no hooks are left, the log says what is kept, and the model can run."""

from __future__ import annotations

import copy

import llmcompressor
import pytest
import torch
from conftest import quantize, tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from helpers import quantized_layers
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines import CalibrationPipeline

from autoround_modifier import (
    AutoRoundModifier,
    AutoSchemeModifier,
    RecipeError,
    ScaleDistillationModifier,
    oneshot,
)
from autoround_modifier.blocks import reverse
from autoround_modifier.distillation import distiller
from autoround_modifier.tuning import Tuner


def modifier(**fields) -> AutoRoundModifier:
    groups = {"group_0": weight_scheme(4)}
    defaults = {"iters": 2, "batch_size": 4, "ignore": ["lm_head"], "config_groups": groups}
    return AutoRoundModifier(**{**defaults, **fields})


def interrupting(monkeypatch, owner, name: str, after: int = 0) -> None:
    """Let a function of ``owner`` end by Ctrl-C when it was called ``after`` times."""
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def num_hooks(model) -> int:
    return sum(
        len(x._forward_hooks) + len(x._forward_pre_hooks) + len(x._backward_hooks)
        for x in model.modules()
    )


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def host_oneshot(model, recipe):
    return llmcompressor.oneshot(
        model=model, recipe=recipe, dataset=token_samples(), processor=tiny_tokenizer()
    )


@pytest.mark.parametrize("run", [quantize, host_oneshot], ids=["ours", "host"])
def test_ctrl_c_while_tuning(run, monkeypatch, log):
    model = tiny_llama()
    interrupting(monkeypatch, Tuner, "run", after=1)
    with pytest.raises(KeyboardInterrupt):
        run(model, modifier())
    assert num_hooks(model) == 0
    assert torch.isfinite(outputs(model)).all()
    (error,) = [line for line in log if line.startswith("ERROR")]
    assert "7 of 14 layers quantized" in error
    assert "partly quantized: load it again" in error
    assert "`checkpoint_dir`" in error
    # what is quantized keeps its scheme, what is not has none
    assert all(name.startswith("model.layers.0.") for name in quantized_layers(model))
    before = copy.deepcopy(model.state_dict())
    reset_session()  # LLM-Compressor finalizes the modifiers of the run that stopped
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("activations", [{}, {"input_activations": {"num_bits": 8, "type": "int"}}])
def test_ctrl_c_before_anything_is_quantized_leaves_the_model_as_it_was(
    activations, monkeypatch, log
):
    model = tiny_llama()
    expected = outputs(model)
    keys = set(model.state_dict())
    interrupting(monkeypatch, Tuner, "run")
    groups = {"group_0": weight_scheme(4) | activations}
    with pytest.raises(KeyboardInterrupt):
        quantize(model, modifier(config_groups=groups))
    assert any("The model in memory is as it was" in line for line in log)
    assert set(model.state_dict()) == keys
    assert torch.equal(outputs(model), expected)
    monkeypatch.undo()
    quantize(model, modifier())  # the same object, again
    assert len(quantized_layers(model)) == 14


def test_ctrl_c_in_the_forward_pass_of_the_model(monkeypatch, log):
    """Where no code of this package runs."""
    model = tiny_llama()
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(
        lambda *x: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        quantize(model, modifier())
    handle.remove()
    assert num_hooks(model) == 0
    assert torch.isfinite(outputs(model)).all()
    assert any("7 of 14 layers quantized" in line for line in log)


def test_ctrl_c_with_a_cache_and_static_activations(monkeypatch):
    static = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    recipe = modifier(
        config_groups={"group_0": weight_scheme(4) | {"input_activations": static}},
        kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False},
    )
    model = tiny_llama()
    interrupting(monkeypatch, Tuner, "run", after=1)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe)
    assert num_hooks(model) == 2  # of compressed-tensors, one for the cache of each layer
    assert torch.isfinite(outputs(model)).all()


def test_finished_blocks_are_named_and_taken(tmp_path, monkeypatch, log):
    interrupting(monkeypatch, Tuner, "run", after=1)
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, modifier(checkpoint_dir=str(tmp_path)))
    message = f"1 finished groups of blocks are kept in {tmp_path}: the same run (model, recipe,"
    assert any(message in line for line in log)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=rf"load the original again.*finished in {tmp_path}"):
        quantize(model, modifier(checkpoint_dir=str(tmp_path)))
    quantize(tiny_llama(), modifier(checkpoint_dir=str(tmp_path)))
    assert sum("found finished" in line for line in log) == 1


def test_hooks_of_other_modifiers_go_too(monkeypatch):
    attention = {"group_0": weight_scheme(8, targets=("re:.*self_attn.*_proj$",))}
    gptq = GPTQModifier(config_groups=attention)
    rest = modifier(config_groups={"group_0": weight_scheme(4, targets=("re:.*mlp.*_proj$",))})
    interrupting(monkeypatch, Tuner, "run")
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, [gptq, rest], pipeline="sequential")
    assert num_hooks(model) == 0
    assert torch.isfinite(outputs(model)).all()


def test_ctrl_c_while_schemes_are_measured(monkeypatch, log):
    recipe = [
        AutoSchemeModifier(avg_bits=6, options=["W4A16G32", "W8A16G32"]),
        AutoRoundModifier(iters=2),
    ]
    model = tiny_llama()
    expected = outputs(model)
    interrupting(monkeypatch, reverse.ReversePass, "backward", after=1)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe)
    assert num_hooks(model) == 0
    assert torch.equal(outputs(model), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any("AutoSchemeModifier stopped. The model in memory is as it was" in x for x in log)


def test_ctrl_c_while_scales_are_trained(monkeypatch, log):
    recipe = [modifier(preset="rtn", iters=None), ScaleDistillationModifier(iters=4)]
    interrupting(monkeypatch, distiller, "divergence", after=3)
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe)
    monkeypatch.undo()
    assert num_hooks(model) == 0
    assert any("scales, gains and biases are as before it" in line for line in log)
    rounded = quantize(tiny_llama(), modifier(preset="rtn", iters=None))
    assert torch.equal(outputs(model), outputs(rounded))


# ------------------------------------------------------------------ the same object again


@pytest.mark.parametrize("run", [quantize, host_oneshot], ids=["ours", "host"])
def test_the_same_object_is_not_quantized_twice(run):
    model = run(tiny_llama(), modifier())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=r"quantized already.*q_proj.*load the original again"):
        run(model, modifier(config_groups={"group_0": weight_scheme(8)}))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_the_same_object_of_a_modifier_is_not_used_twice():
    recipe = modifier()
    quantize(tiny_llama(), recipe)
    with pytest.raises(RecipeError, match="this AutoRoundModifier ran before; make a new one"):
        quantize(tiny_llama(), recipe)


def test_schemes_of_a_run_that_never_began_are_forgotten(monkeypatch):
    """LLM-Compressor's own `oneshot` fails between initialisation and calibration."""
    model = tiny_llama()
    interrupting(monkeypatch, CalibrationPipeline, "from_modifiers")
    with pytest.raises(KeyboardInterrupt):
        host_oneshot(model, modifier())
    monkeypatch.undo()
    assert len(quantized_layers(model)) == 14
    mlp = {"group_0": weight_scheme(4, targets=("re:.*mlp.*_proj$",))}
    oneshot(
        model=model,
        recipe=modifier(config_groups=mlp),
        dataset=token_samples(),
        processor=tiny_tokenizer(),
    )
    assert all(".mlp." in name for name in quantized_layers(model))
