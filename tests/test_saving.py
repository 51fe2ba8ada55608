"""What is saved is bit for bit what was tuned."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from conftest import quantize, tiny_llama, weight_scheme
from helpers import (
    integers,
    quantized_layers,
    saved_integers,
    saved_tensors,
    saved_zero_points,
    tuned_weight,
)
from transformers import AutoModelForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.host.write_back import write_back


@pytest.mark.parametrize("group_size", [32, None], ids=["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_saved_integers_are_the_tuned_integers(num_bits, symmetric, group_size, written, tmp_path):
    model = tiny_llama(num_layers=1)
    scheme = weight_scheme(num_bits, symmetric, group_size)
    modifier = AutoRoundModifier(
        iters=4, batch_size=4, ignore=["lm_head"], config_groups={"group_0": scheme}
    )
    quantize(model, modifier)
    layers = quantized_layers(model)
    assert set(layers.values()) == set(written)
    expected = {name: written[module] for name, module in layers.items()}
    for name, module in layers.items():
        assert torch.equal(integers(module), expected[name][0].values)

    model.save_pretrained(tmp_path, save_compressed=True)
    tensors = saved_tensors(tmp_path)
    total = moved_total = 0
    for name, (weight, moved) in expected.items():
        assert torch.equal(saved_integers(tensors, name, num_bits), weight.values)
        assert torch.equal(tensors[f"{name}.weight_scale"], weight.scale)
        if symmetric:
            assert f"{name}.weight_zero_point" not in tensors
        else:
            assert torch.equal(saved_zero_points(tensors, name, num_bits), weight.zero_point)
            assert weight.zero_point.any()
        total += weight.values.numel()
        moved_total += moved
    # The library cannot carry every 7- and 8-bit integer through bfloat16; up to 6 bits it can.
    limit = {7: 0.001, 8: 0.03}.get(num_bits, 0.0)
    assert moved_total <= limit * total


def test_integers_move_only_where_bfloat16_has_no_value_for_them():
    # 8 bits, float32: all survive, so the limit is the dtype's, not the format's.
    args = QuantizationArgs(num_bits=8, symmetric=False, strategy="group", group_size=32)
    moved = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.manual_seed(0)
        linear = torch.nn.Linear(256, 256, bias=False, dtype=dtype)
        quantized = tuned_weight(linear.weight, args).quantized()
        before = quantized.values.clone()
        for name in ("weight_scale", "weight_zero_point"):
            value = getattr(quantized, name.removeprefix("weight_"))
            linear.register_parameter(name, torch.nn.Parameter(value.clone(), requires_grad=False))
        moved[dtype] = write_back(linear, quantized, args)
        assert (quantized.values.int() - before.int()).abs().max() <= 1
        assert int((quantized.values != before).sum()) == moved[dtype]
    assert moved[torch.float32] == moved[torch.float16] == 0
    assert 0 < moved[torch.bfloat16] < 0.03 * 256 * 256


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_transformers_reloads(num_bits, symmetric, tmp_path):
    model = tiny_llama()
    scheme = weight_scheme(num_bits, symmetric)
    recipe = AutoRoundModifier(iters=3, batch_size=4, config_groups={"group_0": scheme})
    quantize(model, recipe)
    ids = torch.arange(24).view(2, 12)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "first", save_compressed=True)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    torch.testing.assert_close(reloaded(ids).logits, expected, rtol=0, atol=1e-2)
    reloaded.to("cpu")
    in_float32 = reloaded.to(torch.float32)(ids).logits
    assert (in_float32 - expected.float()).norm() < 0.02 * expected.float().norm()

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    fresh.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("target", ["Linear", "Embedding"])
def test_targets_outside_of_blocks_get_real_scales(target, tmp_path):
    model = tiny_llama()
    ids = torch.arange(24).view(2, 12)
    original = model(ids).logits.float()
    groups = {"group_0": weight_scheme(4, targets=(target,))}
    fields = {"iters": 2} if target == "Linear" else {"preset": "opt_rtn"}  # no embedding is tuned
    fields["engine"] = "vllm"  # Transformers loads no packed embeddings
    quantize(model, AutoRoundModifier(**fields, batch_size=4, config_groups=groups))
    quantized = model(ids).logits.float()
    assert (quantized - original).norm() < 0.5 * original.norm()

    name = {"Linear": "lm_head", "Embedding": "model.embed_tokens"}[target]
    expected = integers(model.get_submodule(name))
    model.save_pretrained(tmp_path, save_compressed=True)
    tensors = saved_tensors(tmp_path)
    scale = tensors[f"{name}.weight_scale"].float()
    assert torch.isfinite(scale).all()
    assert (scale != 0).all()
    assert torch.equal(saved_integers(tensors, name, 4), expected)
    if target == "Linear":  # Transformers 5.17 cannot load a packed embedding of any origin
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(reloaded(ids).logits.float(), quantized, rtol=0, atol=2e-2)


def test_tied_lm_head_is_untied_when_quantized(tmp_path):
    model = tiny_llama(tied=True)
    recipe = AutoRoundModifier(iters=2, batch_size=4, config_groups={"group_0": weight_scheme(4)})
    quantize(model, recipe)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    ids = torch.arange(24).view(2, 12)
    expected = model(ids).logits
    model.save_pretrained(tmp_path, save_compressed=True)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, expected, rtol=0, atol=1e-2)


def test_a_class_derived_from_linear_is_packed(tmp_path):
    """compressed-tensors alone would save it in full precision (Falcon's layers)."""

    class Derived(torch.nn.Linear):
        pass

    model = tiny_llama(num_layers=1)
    model.model.layers[0].mlp.down_proj.__class__ = Derived
    groups = {"group_0": weight_scheme(4, targets=("Derived",))}
    recipe = AutoRoundModifier(iters=2, batch_size=4, config_groups=groups)
    quantize(model, recipe)
    name = "model.layers.0.mlp.down_proj"
    expected = integers(model.get_submodule(name))
    model.save_pretrained(tmp_path, save_compressed=True)
    assert torch.equal(saved_integers(saved_tensors(tmp_path), name, 4), expected)
