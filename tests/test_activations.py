"""Quantized activations: what the tuner computes is what the saved checkpoint computes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from helpers import quantized_layers, saved_integers, saved_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import nn
from transformers import AutoModelForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.activations import ActivationQuantizer
from autoround_modifier.device import Compute
from autoround_modifier.errors import CalibrationError, SchemeError
from autoround_modifier.evaluation import compare
from autoround_modifier.host.saved_format import choose_saved_format

MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "type": "float"}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
INT8_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
INT8_TENSOR = {"num_bits": 8, "strategy": "tensor", "observer": "static_minmax"}
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FP8_TENSOR = {**INT8_TENSOR, "type": "float"}
ACTIVATIONS = {
    "int8 token": INT8_TOKEN,
    "int8 token asymmetric": {**INT8_TOKEN, "symmetric": False},
    "int8 tensor": INT8_TENSOR,
    "int8 tensor asymmetric": {**INT8_TENSOR, "symmetric": False},
    "fp8 token": FP8_TOKEN,
    "fp8 tensor": FP8_TENSOR,
    "fp8 group": {**FP8_TOKEN, "strategy": "group", "group_size": 32},
    "mxfp4": {**MX, "num_bits": 4, "dynamic": True},
    "mxfp8": {**MX, "num_bits": 8, "dynamic": True},
    "nvfp4": {**NVFP4, "dynamic": "local", "observer": "static_minmax"},
}
INT8_CHANNEL = {"num_bits": 8, "strategy": "channel"}
INT4_GROUP = {"num_bits": 4, "strategy": "group", "group_size": 32}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
FP8_BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}

# name -> weights, activations
SCHEMES = {
    "W8A8 dynamic": (INT8_CHANNEL, "int8 token"),
    "W8A8 static": (INT8_CHANNEL, "int8 tensor"),
    "W8A8 static asymmetric": (INT8_CHANNEL, "int8 tensor asymmetric"),
    "W4A8 group": (INT4_GROUP, "int8 token"),
    "W4A8 channel": ({"num_bits": 4, "strategy": "channel"}, "int8 token"),
    "W4AFP8": (INT4_GROUP, "fp8 token"),
    "FP8 dynamic": (FP8_CHANNEL, "fp8 token"),
    "FP8 static": ({**FP8_CHANNEL, "strategy": "tensor"}, "fp8 tensor"),
    "FP8 block": (FP8_BLOCK, "fp8 group"),
    "MXFP4": ({**MX, "num_bits": 4}, "mxfp4"),
    "MXFP8": ({**MX, "num_bits": 8}, "mxfp8"),
    "NVFP4": (NVFP4, "nvfp4"),
}
KV_CACHE = {
    "tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    "attn_head": {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False},
}
UNSEEN = torch.tensor(token_samples(8, 12, seed=99)["input_ids"])


def scheme(name: str) -> dict:
    weights, activations = SCHEMES[name]
    return {
        "targets": ["Linear"],
        "weights": {"symmetric": True, **weights},
        "input_activations": {"symmetric": True, **ACTIVATIONS[activations]},
    }


def tuned(name: str, preset: str = "light", model=None, data=None, **fields):
    fields = {"preset": preset, "ignore": ["lm_head"], "batch_size": 8, **fields}
    # "none": some of these models have layers that no engine knows
    recipe = AutoRoundModifier(config_groups={"group_0": scheme(name)}, engine="none", **fields)
    data = token_samples(64) if recipe.requires_calibration_data and data is None else data
    return quantize(tiny_llama() if model is None else model, recipe, data)


def quantizer_of(name: str, x: torch.Tensor) -> ActivationQuantizer:
    """A calibrated quantizer, whose scale is that of ``x``."""
    args = QuantizationArgs(**{"symmetric": True, **ACTIVATIONS[name]})
    layer = nn.Linear(x.shape[-1], 1)
    layer.quantization_scheme = QuantizationScheme(targets=["Linear"], input_activations=args)
    layer.quantization_status = QuantizationStatus.CALIBRATION
    for parameter in ("scale", "zero_point", "global_scale"):
        value = torch.zeros(1, dtype=torch.float32 if parameter == "global_scale" else x.dtype)
        setattr(layer, f"input_{parameter}", nn.Parameter(value, requires_grad=False))
    if args.strategy != "tensor_group":
        del layer.input_global_scale
    if args.dynamic:
        del layer.input_scale, layer.input_zero_point
    quantizer = ActivationQuantizer("layer", layer, "input", args)
    if not quantizer.calibrated:
        quantizer.record(x)
        quantizer.calibrate()
    return quantizer


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["normal", "zeros", "one hot", "constant", "outliers"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=15, deadline=None)
def test_gradients_pass_straight_through(name, seed, kind, dtype):
    """The value is that of the format; the gradient is 1 within its range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    match kind:
        case "zeros":
            x.zero_()
        case "one hot":
            x *= torch.rand(x.shape, generator=generator) < 0.05
        case "constant":
            x.fill_(0.3)
        case "outliers":
            x[0, 0, 0] = 1000
    quantizer = quantizer_of(name, x)
    leaf = x.clone().requires_grad_()
    out = quantizer.quantize(leaf)
    assert torch.equal(out, forward_quantize(quantizer.module, x, "input", quantizer.args))
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    cotangent = torch.randn(x.shape, generator=generator).to(dtype)
    out.backward(cotangent)
    if quantizer.args.dynamic or quantizer.args.symmetric:
        assert torch.equal(leaf.grad, cotangent)
    else:  # rounding of the zero point may cut the ends off
        edge = 0.03 * (x.float().max() - x.float().min())
        inner = (x.float() >= x.float().min() + edge) & (x.float() <= x.float().max() - edge)
        assert torch.equal(leaf.grad[inner], cotangent[inner])
    if kind in ("normal", "constant"):
        bits = quantizer.args.num_bits
        tolerance = {("int", 8): 0.01, ("float", 8): 0.04, ("float", 4): 0.26}[
            quantizer.args.type, bits
        ]
        limit = x.float().abs().max() if bits == 8 else x.float().abs().max() / 2
        assert (out.float() - x.float()).abs().max() <= tolerance * limit * 2


@pytest.mark.parametrize("name", ["int8 token", "fp8 tensor", "mxfp4", "nvfp4"])
def test_fused_and_plain_agree(name):
    x = torch.randn(3, 7, 64).bfloat16()
    quantizer = quantizer_of(name, x)
    plain = [leaf := x.clone().requires_grad_(), quantizer.quantize(leaf)]
    quantizer.compute = Compute(compiled=True)
    compiled = [leaf := x.clone().requires_grad_(), quantizer.quantize(leaf)]
    assert torch.equal(plain[1], compiled[1])
    for leaf, out in (plain, compiled):
        (2 * out).sum().backward()
        assert torch.equal(leaf.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("name", ["int8 tensor", "fp8 tensor", "int8 tensor asymmetric"])
def test_no_gradient_beyond_a_static_range(name):
    x = torch.linspace(-1, 1, 64).view(1, 1, 64)
    quantizer = quantizer_of(name, x)
    leaf = (3 * x).requires_grad_()
    out = quantizer.quantize(leaf)
    out.sum().backward()
    inside = leaf.abs() < 0.99
    assert torch.equal(leaf.grad[inside], torch.ones(int(inside.sum())))
    assert not leaf.grad[leaf.abs() > 1.02].any()
    assert out.abs().max() < 1.02


@pytest.mark.parametrize("name", ["int8 token", "fp8 token"])
def test_tokens_of_experts_have_scales_of_their_own(name):
    """A routed expert sees (tokens, features)."""
    x = torch.randn(6, 64) * torch.logspace(-2, 2, 6)[:, None]
    quantizer = quantizer_of(name, x)
    assert torch.equal(quantizer.quantize(x), quantizer.quantize(x[None])[0])
    assert ((quantizer.quantize(x) - x).abs().amax(1) < 0.04 * x.abs().amax(1)).all()


def test_padding_is_not_observed():
    x = torch.randn(2, 4, 64)
    mask = torch.tensor([[False, True, True, True], [True] * 4])
    padded = x.clone()
    padded[0, 0] = 1e6
    args = QuantizationArgs(**INT8_TENSOR)
    quantizers = [ActivationQuantizer("layer", nn.Linear(64, 1), "input", args) for _ in range(2)]
    quantizers[0].record(padded, mask)
    quantizers[1].record(x[mask])
    first, second = (quantizer.statistics.scales()["scale"] for quantizer in quantizers)
    assert torch.equal(first, second)

    keys = torch.randn(2, 3, 4, 8)
    padded = keys.clone()
    padded[0, :, 0] = 1e6
    args = QuantizationArgs(**KV_CACHE["attn_head"])
    quantizers = [ActivationQuantizer("attention", nn.Identity(), "k", args) for _ in range(2)]
    quantizers[0].record(padded, mask)
    quantizers[1].record(keys[:, :, 1:])
    scales = [quantizer.statistics.scales()["scale"] for quantizer in quantizers]
    assert scales[0].shape == (3, 1, 1)
    assert (scales[0] < 1).all()


# ------------------------------------------------------------------ through the modifier


@pytest.mark.parametrize("preset", ["rtn", "light"])
@pytest.mark.parametrize("name", SCHEMES)
def test_saves_and_reloads(name, preset, tmp_path):
    """The checkpoint computes what the model in memory computes, activations included."""
    model = tuned(name, preset, **({"iters": 4} if preset == "light" else {}))
    assert len(quantized_layers(model)) == 14
    logits = model(UNSEEN).logits
    model.save_pretrained(tmp_path, save_compressed=True)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(UNSEEN).logits, logits, rtol=0, atol=2e-2)
    for layer in quantized_layers(model).values():
        for parameter, value in layer.named_parameters(recurse=False):
            if parameter.startswith("input"):
                assert torch.isfinite(value.float()).all()
                assert parameter.endswith("zero_point") or (value > 0).all()


@pytest.mark.parametrize("name", ["W8A8 dynamic", "W8A8 static", "W4A8 group", "W4A8 channel"])
def test_saved_integers_are_the_tuned_integers(name, written, tmp_path):
    """With integer activations the library saves one to a byte."""
    model = tuned(name, iters=4)
    expected = {layer: written[module][0] for layer, module in quantized_layers(model).items()}
    model.save_pretrained(tmp_path, save_compressed=True)
    tensors = saved_tensors(tmp_path)
    for layer, weight in expected.items():
        saved = tensors[f"{layer}.weight"]
        assert saved.dtype == torch.int8
        assert torch.equal(saved, weight.values), layer
        assert torch.equal(tensors[f"{layer}.weight_scale"], weight.scale)


@pytest.mark.parametrize(
    ("weights", "activations", "packed"),
    [
        (INT8_CHANNEL, INT8_TOKEN, False),
        (INT8_CHANNEL, INT8_TENSOR, False),
        (INT4_GROUP, INT8_TOKEN, False),
        (INT4_GROUP, FP8_TOKEN, True),
        ({**INT8_CHANNEL, "symmetric": False}, INT8_TOKEN, True),
        ({**INT4_GROUP, "symmetric": False}, INT8_TOKEN, True),
        ({**INT4_GROUP, "num_bits": 8}, INT8_TOKEN, True),
        ({**INT4_GROUP, "num_bits": 2}, INT8_TOKEN, True),
        (INT4_GROUP, {**INT8_TOKEN, "strategy": "group", "group_size": 32}, True),
    ],
)
def test_which_integers_are_packed(weights, activations, packed):
    one = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**{"symmetric": True, **weights}),
        input_activations=QuantizationArgs(**{"symmetric": True, **activations}),
    )
    choose_saved_format(one)
    assert one.format == ("pack-quantized" if packed else None)


def test_static_scales_without_tuning_see_all_samples():
    """Not only as many as the preset would tune on."""
    data = token_samples(24)
    scales = []
    for num_calibration_samples in (2, 24):
        recipe = AutoRoundModifier(
            preset="opt_rtn",
            num_calibration_samples=num_calibration_samples,
            config_groups={"group_0": scheme("W8A8 static")},
            ignore=["lm_head"],
        )
        model = quantize(tiny_llama(), recipe, data)
        scales.append([float(x.input_scale) for x in quantized_layers(model).values()])
    assert scales[0] == scales[1]


@pytest.mark.parametrize("preset", ["W2A8", "W3A8", "W6A8", "W4A4"])
def test_other_widths_with_integer_activations_are_packed(preset, tmp_path):
    """vLLM's schemes for them read nothing else."""
    recipe = AutoRoundModifier(preset="rtn", scheme=preset, ignore=["lm_head"])
    model = quantize(tiny_llama(hidden_size=128), recipe)
    model.save_pretrained(tmp_path, save_compressed=True)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"


@pytest.mark.parametrize(
    ("name", "fields"), [("W4AFP8", {}), ("W4A8 group", {"format": "pack-quantized"})]
)
def test_packed_integers_with_activations(name, fields, written, tmp_path):
    """vLLM's scheme for W4AFP8, and its GPU kernel for W4A8, read nothing else."""
    group = scheme(name) | fields
    model = quantize(
        tiny_llama(),
        AutoRoundModifier(iters=2, config_groups={"group_0": group}, ignore=["lm_head"]),
        token_samples(8),
    )
    logits = model(UNSEEN).logits
    expected = {layer: written[module][0] for layer, module in quantized_layers(model).items()}
    model.save_pretrained(tmp_path, save_compressed=True)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    tensors = saved_tensors(tmp_path)
    for layer, weight in expected.items():
        assert torch.equal(saved_integers(tensors, layer, 4), weight.values), layer
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(UNSEEN).logits, logits, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["NVFP4", "W4A8 group"])
def test_tuning_beats_rounding(name):
    kl = {
        preset: sum(
            compare(tiny_llama(), tuned(name, preset, seed=seed), UNSEEN).kl for seed in range(runs)
        )
        / runs
        for preset, runs in {"rtn": 1, "opt_rtn": 1, "light": 2}.items()
    }
    assert kl["light"] < min(kl["opt_rtn"], kl["rtn"])


@pytest.mark.parametrize("name", ["W8A8 static", "MXFP4"])
def test_the_tuner_sees_what_inference_computes(name, monkeypatch):
    """The loss of the last block's best candidate is that of the finished model on the chain."""
    from autoround_modifier.blocks import group as blocks

    advanced = []
    original = blocks.BlockGroup.advance

    def advance(group, hidden, *more):
        original(group, hidden, *more)
        advanced.append([one.clone() for one in hidden])

    monkeypatch.setattr(blocks.BlockGroup, "advance", advance)
    data = token_samples(8)
    model = tuned(name, iters=2, data=data)
    (chain,) = advanced  # the second block is the last
    seen = []
    handle = model.model.layers[0].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(torch.tensor(data["input_ids"]))
    handle.remove()
    chain = torch.cat(chain)
    (seen,) = seen
    by_content = [min(range(8), key=lambda i: (seen[i] - row).abs().max()) for row in chain]
    assert sorted(by_content) == list(range(8))
    torch.testing.assert_close(seen[by_content], chain, rtol=0.02, atol=0.02)


def test_static_scales_are_those_of_the_quantized_chain():
    """The second block's inputs come from the quantized first one."""
    data = token_samples(8)
    group = weight_scheme(2) | {"input_activations": INT8_TENSOR}
    recipe = AutoRoundModifier(config_groups={"group_0": group}, ignore=["lm_head"], iters=2)
    model = quantize(tiny_llama(), recipe, data)
    name = "model.layers.1.self_attn.q_proj"

    def largest_input(model) -> float:
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: seen.append(float(args[0].abs().max()))
        )
        with torch.no_grad():
            model(torch.tensor(data["input_ids"]))
        handle.remove()
        return seen[0]

    observed = float(model.get_submodule(name).input_scale) * 127.5
    assert observed == pytest.approx(largest_input(model), rel=0.03)
    assert observed != pytest.approx(largest_input(tiny_llama()), rel=0.03)


@pytest.mark.parametrize("strategy", KV_CACHE)
@pytest.mark.parametrize("preset", ["rtn", "light"])
def test_key_value_cache(strategy, preset, tmp_path):
    fields = {"iters": 4} if preset == "light" else {}
    recipe = AutoRoundModifier(
        preset=preset,
        config_groups={"group_0": weight_scheme(8, group_size=None)},
        kv_cache_scheme=KV_CACHE[strategy],
        ignore=["lm_head"],
        batch_size=8,
        **fields,
    )
    model = quantize(tiny_llama(), recipe, token_samples(64))
    for block in model.model.layers:
        for scale in (block.self_attn.k_scale, block.self_attn.v_scale):
            assert scale.shape == ((1,) if strategy == "tensor" else (2, 1, 1))
            assert (scale > 1e-4).all()
    logits = model(UNSEEN).logits
    assert 0 < compare(tiny_llama(), model, UNSEEN).kl < 0.05
    model.save_pretrained(tmp_path, save_compressed=True)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(UNSEEN).logits, logits, rtol=0, atol=2e-2)


def test_keys_and_values_have_gradients():
    """Quantizing the cache must not keep k_proj and v_proj from being tuned."""

    def recipe(iters: int) -> AutoRoundModifier:
        return AutoRoundModifier(
            iters=iters,
            config_groups={"group_0": weight_scheme(2)},
            kv_cache_scheme=KV_CACHE["tensor"],
            ignore=["lm_head"],
            batch_size=8,
        )

    tuned, searched = (quantize(tiny_llama(), recipe(iters), token_samples(32)) for iters in (8, 0))
    for name, layer in quantized_layers(searched).items():
        if name.endswith(("k_proj", "v_proj")):
            assert not torch.equal(layer.weight, tuned.get_submodule(name).weight), name


def test_the_original_cache_still_works():
    """Generation with a cache goes through the quantized one."""
    recipe = AutoRoundModifier(
        preset="rtn",
        config_groups={"group_0": weight_scheme(8, group_size=None)},
        kv_cache_scheme=KV_CACHE["tensor"],
        ignore=["lm_head"],
    )
    model = quantize(tiny_llama(), recipe, token_samples(16))
    tokens = model.generate(UNSEEN[:1], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 16)


def test_static_scales_see_smoothed_activations():
    """In one pass SmoothQuant changes a block after the full-precision pass has run it."""
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.9),
        AutoRoundModifier(
            preset="rtn", config_groups={"group_0": scheme("W8A8 static")}, ignore=["lm_head"]
        ),
    ]
    data = token_samples(32)
    model = quantize(tiny_llama(), recipe, data, pipeline="sequential")
    seen = {}
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: float(args[0].abs().max())})
        )
    with torch.no_grad():
        model(torch.tensor(data["input_ids"]))
    for name, layer in quantized_layers(model).items():
        assert float(layer.input_scale) * 127.5 == pytest.approx(seen[name], rel=0.1), name


def test_rtn_rounds_to_nearest_whatever_the_activations():
    models = [tuned(name, "rtn") for name in ("W8A8 static", "W8A8 dynamic")]
    layers = [quantized_layers(model).values() for model in models]
    for static, dynamic in zip(*layers, strict=True):
        assert torch.equal(static.weight, dynamic.weight)


def test_static_scales_do_not_depend_on_batches():
    group = weight_scheme(8, group_size=None) | {
        "input_activations": {"num_bits": 8, "strategy": "tensor"}  # no observer named
    }

    def scales(batch_size: int) -> dict[str, torch.Tensor]:
        recipe = AutoRoundModifier(
            preset="rtn",
            config_groups={"group_0": group},
            kv_cache_scheme=KV_CACHE["tensor"],
            batch_size=batch_size,
        )
        model = quantize(tiny_llama(), recipe, token_samples(32), batch_size=batch_size)
        return {
            name: value
            for name, value in model.named_parameters()
            if name.endswith(("input_scale", "k_scale", "v_scale"))
        }

    one, all_at_once = scales(1), scales(32)
    assert len(one) == 2 * 9 + 1  # seven layers, keys and values of each block; lm_head
    for name, value in one.items():
        assert torch.equal(value, all_at_once[name]), name


@pytest.mark.parametrize("kind", ["cache", "inputs"])
def test_basic_pipeline_agrees_with_the_sequential_one(kind):
    """It runs the whole model at once, and leaves quantization enabled."""
    group = weight_scheme(2) if kind == "cache" else scheme("W8A8 static")
    models = [
        quantize(
            tiny_llama(),
            AutoRoundModifier(
                iters=8,
                batch_size=8,
                config_groups={"group_0": group},
                kv_cache_scheme=KV_CACHE["tensor"],
                ignore=["lm_head"],
            ),
            token_samples(32),
            pipeline=pipeline,
        )
        for pipeline in ("basic", "sequential")
    ]
    searched = quantize(
        tiny_llama(),
        AutoRoundModifier(preset="opt_rtn", config_groups={"group_0": group}, ignore=["lm_head"]),
        token_samples(32),
    )
    states = [model.state_dict() for model in models]
    for name, value in states[1].items():
        if name.endswith("scale"):
            torch.testing.assert_close(states[0][name], value, rtol=0.1, atol=0.0, msg=name)
        elif name.endswith(("k_proj.weight", "v_proj.weight")) and kind == "cache":
            assert not torch.equal(states[0][name], searched.state_dict()[name]), name


@pytest.mark.parametrize("name", ["W8A8 static", "NVFP4"])
def test_rtn_needs_data_for_static_scales(name):
    recipe = AutoRoundModifier(preset="rtn", config_groups={"group_0": scheme(name)})
    assert recipe.requires_calibration_data
    dynamic = AutoRoundModifier(preset="rtn", config_groups={"group_0": scheme("FP8 dynamic")})
    assert not dynamic.requires_calibration_data


@pytest.mark.parametrize("place", ["model", "model.layers.1"])
def test_a_cache_that_no_sample_reaches_keeps_the_scale_of_engines(place, log):
    """Like that of a vision tower, when the calibration data is text."""
    model = tiny_llama()
    unused = copy.deepcopy(model.model.layers[0].self_attn)
    model.get_submodule(place).unused = unused
    recipe = AutoRoundModifier(
        preset="rtn",
        config_groups={"group_0": weight_scheme(8, group_size=None)},
        kv_cache_scheme=KV_CACHE["tensor"],
        ignore=["lm_head"],
        engine="none",  # no checkpoint of such a model loads
    )
    quantize(model, recipe, token_samples(8))
    assert unused.k_scale == unused.v_scale == 1
    assert model.model.layers[0].self_attn.k_scale != 1
    assert any(f"{place}.unused: no calibration sample reached its key-value" in x for x in log)


@pytest.mark.parametrize("name", ["FP8 static", "W8A8 static"])
def test_no_hooks_are_left_after_a_failure(name):
    model = tiny_llama()
    model.model.layers[1].mlp.unused = nn.Linear(64, 64, dtype=torch.bfloat16)
    with pytest.raises(CalibrationError):
        tuned(name, "opt_rtn", model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_no_sample_reaches():
    model = tiny_llama()
    model.model.layers[1].mlp.unused = nn.Linear(64, 64, dtype=torch.bfloat16)
    with pytest.raises(CalibrationError, match=r"layers.1.mlp.unused: .*no calibration sample"):
        tuned("W8A8 static", "rtn", model)


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        (INT4_GROUP, ACTIVATIONS["nvfp4"], "integer weights go with integer activations"),
        (INT4_GROUP, ACTIVATIONS["mxfp4"], "integer weights go with integer activations"),
        (FP8_CHANNEL, INT8_TOKEN, "FP8 weights by tensor or channel go with FP8 activations"),
        (NVFP4, FP8_TOKEN, "NVFP4 weights go with NVFP4 activations"),
        (NVFP4, {**ACTIVATIONS["nvfp4"], "group_size": 32}, "`group_size: 16`"),
        ({**MX, "num_bits": 8}, FP8_TOKEN, "MX weights go with dynamic activations"),
        ({**MX, "num_bits": 4}, {**ACTIVATIONS["mxfp4"], "group_size": 16}, "`group_size: 32`"),
        (FP8_CHANNEL, ACTIVATIONS["mxfp8"], "FP8 weights by tensor or channel"),
        (FP8_BLOCK, FP8_TOKEN, "as long as the block is wide"),
        (FP8_BLOCK, {**ACTIVATIONS["fp8 group"], "group_size": 64}, "as long as the block is wide"),
        (FP8_BLOCK, FP8_TENSOR, "as long as the block is wide"),
        ({**FP8_CHANNEL, "strategy": "group", "group_size": 32}, FP8_TOKEN, "by tensor or channel"),
        (INT8_CHANNEL, FP8_TOKEN, "4 bits, symmetric, by `group` only"),
        ({**INT4_GROUP, "symmetric": False}, FP8_TOKEN, "4 bits, symmetric, by `group` only"),
        (FP8_CHANNEL, {**FP8_TOKEN, "symmetric": False}, "no zero point; set `symmetric: true`"),
        (INT8_CHANNEL, {**INT8_TOKEN, "strategy": "group", "group_size": 48}, "group_size 48"),
    ],
)
def test_refuses_activations_that_do_not_go_with_the_weights(weights, activations, message):
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, **weights},
        "input_activations": {"symmetric": True, **activations},
    }
    recipe = AutoRoundModifier(preset="rtn", config_groups={"group_0": group}, ignore=["lm_head"])
    with pytest.raises(SchemeError, match=message):
        quantize(tiny_llama(), recipe)


@pytest.mark.parametrize("preset", ["rtn", "opt_rtn", "light"])
@pytest.mark.parametrize("name", [*SCHEMES, "INT2 asymmetric"])
def test_degenerate_layers(name, preset, tmp_path):
    """A layer of zeros has no largest weight to derive a scale from, nor has an input of zeros."""
    model = tiny_llama()
    first, second = model.model.layers
    zeros = (first.self_attn.q_proj, first.mlp.down_proj)
    for layer in zeros:
        layer.weight.data.zero_()
    first.mlp.up_proj.weight.data.fill_(0.25)
    second.self_attn.o_proj.weight.data[0] = 0
    second.post_attention_layernorm.weight.data.zero_()  # gate and up see zeros
    group = weight_scheme(2, False) if name == "INT2 asymmetric" else scheme(name)
    fields = {"iters": 2} if preset == "light" else {}
    recipe = AutoRoundModifier(
        preset=preset, config_groups={"group_0": group}, ignore=["lm_head"], batch_size=8, **fields
    )
    quantize(model, recipe, token_samples(16) if recipe.requires_calibration_data else None)

    for layer_name, layer in quantized_layers(model).items():
        for parameter, value in layer.named_parameters():
            assert torch.isfinite(value.float()).all(), f"{layer_name}.{parameter}"
    assert not any(layer.weight.any() for layer in zeros)
    if group["weights"]["num_bits"] == 8:
        assert (first.mlp.up_proj.weight - 0.25).abs().max() < 0.02
    logits = model(UNSEEN).logits
    assert torch.isfinite(logits).all()
    model.save_pretrained(tmp_path, save_compressed=True)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(UNSEEN).logits, logits, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [("W4A8 group", "NVFP4"), ("FP8 dynamic", None), ("MXFP8", "MXFP4"), (None, "FP8 block")],
)
def test_two_formats_in_one_checkpoint(attention, mlp, tmp_path):
    """None: 2-bit integers with 16-bit activations."""

    def part(name: str | None, target: str) -> dict:
        return (weight_scheme(2) if name is None else scheme(name)) | {"targets": [target]}

    groups = {
        "attention": part(attention, r"re:.*self_attn\..*_proj$"),
        "mlp": part(mlp, r"re:.*mlp\..*_proj$"),
    }
    recipe = AutoRoundModifier(iters=2, config_groups=groups, batch_size=8, ignore=["lm_head"])
    model = quantize(tiny_llama(), recipe, token_samples(16))
    logits = model(UNSEEN).logits
    model.save_pretrained(tmp_path, save_compressed=True)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len({group["format"] for group in config["config_groups"].values()}) == 2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(UNSEEN).logits, logits, rtol=0, atol=2e-2)
