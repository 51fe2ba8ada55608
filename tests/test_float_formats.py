"""Floating-point weights against tables built from bits, compressed-tensors and the saved file."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import quantize, tiny_llama, token_samples
from helpers import quantized_layers, saved_floats, saved_tensors, search_range, tuned_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.errors import SchemeError
from autoround_modifier.evaluation import compare
from autoround_modifier.formats.floating import E2M1, E4M3, exponent_of, power_of_two
from autoround_modifier.formats.grouping import observed_range
from autoround_modifier.host.schemes import weight_spec
from autoround_modifier.search import shared_global_scale

SCHEMES = {
    "fp8 tensor": {"num_bits": 8, "strategy": "tensor"},
    "fp8 channel": {"num_bits": 8, "strategy": "channel"},
    "fp8 block": {"num_bits": 8, "strategy": "block", "block_structure": [24, 48]},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    },
}


def args_of(name: str) -> QuantizationArgs:
    return QuantizationArgs(**{"type": "float", "symmetric": True, **SCHEMES[name]})


def table(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """Every non-negative number of a format with subnormals, from its bit encodings."""
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = mantissa / 2**mantissa_bits
        if exponent == 0:
            numbers.append(fraction * 2.0 ** (1 - bias))
        else:
            numbers.append((1 + fraction) * 2.0 ** (exponent - bias))
    return numbers


# All exponents count: neither has infinities. In E4M3 the last encoding is NaN.
NUMBERS = {E2M1: table(2, 1), E4M3: table(4, 3)[:-1]}


@pytest.mark.parametrize("element", NUMBERS, ids=["E2M1", "E4M3"])
def test_rounds_to_the_nearest_number_of_the_table(element):
    numbers = torch.tensor(NUMBERS[element])
    assert numbers.max() == element.max_value
    assert torch.equal(element.round(numbers), numbers)
    assert torch.equal(element.round(-numbers), -numbers)
    middle = (numbers[1:] + numbers[:-1]) / 2
    even = torch.arange(len(middle)) % 2 == 0  # ties go to the even encoding
    assert torch.equal(element.round(middle), torch.where(even, numbers[:-1], numbers[1:]))
    below, above = middle * (1 - 2.0**-20), middle * (1 + 2.0**-20)
    assert torch.equal(element.round(below), numbers[:-1])
    assert torch.equal(element.round(above), numbers[1:])
    assert element.round(torch.tensor(1e9)) == element.max_value


@pytest.mark.parametrize("element", NUMBERS, ids=["E2M1", "E4M3"])
def test_one_unit_of_v_is_one_local_step(element):
    numbers = torch.tensor(NUMBERS[element])
    up = element.round(numbers[:-1], torch.ones(len(numbers) - 1))
    assert torch.equal(up, numbers[1:])


def test_exponents():
    x = torch.tensor([1.0, 1.5, 2.0, 0.75, 2.0**-126, 2.0**127, -3.0])
    assert exponent_of(x).tolist() == [0, 0, 1, -1, -126, 127, 1]
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert torch.equal(power_of_two(exponents), 2.0 ** exponents.double().float())


def weights_of(seed: int, kind: str, rows: int = 50, columns: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    match kind:
        case "zeros":
            weight.zero_()
        case "denormal":
            weight *= 1e-40
        case "one hot":
            weight *= torch.rand(weight.shape, generator=generator) < 0.02
        case "constant":
            weight.fill_(0.3)
        case "outliers":
            weight[3, 5] = 1e4
    return weight


@pytest.mark.parametrize("name", SCHEMES)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["normal", "zeros", "denormal", "one hot", "constant", "outliers"]),
)
@settings(max_examples=20, deadline=None)
def test_equals_compressed_tensors(name, seed, kind):
    weight, args = weights_of(seed, kind), args_of(name)
    global_scale = None
    if name == "nvfp4":
        layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
        layer.weight.data = weight
        global_scale = shared_global_scale([layer.weight])
    found = search_range(weight, args, torch.rand(weight.shape[1]), global_scale)
    for initial in (None, found):
        ours = tuned_weight(weight, args, initial, global_scale).quantized()
        theirs = fake_quantize(weight, ours.scale, ours.zero_point, args, global_scale=global_scale)
        assert torch.isfinite(ours.dequantize()).all()
        torch.testing.assert_close(ours.dequantize(), theirs.float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_observed_scales_are_those_of_compressed_tensors(name):
    weight, args = weights_of(3, "normal", 48, 96), args_of(name)
    global_scale = torch.tensor([448 * 6 / weight.abs().max()]) if name == "nvfp4" else None
    groups = weight_spec(args).grouping(weight.shape).split(weight)
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale)
    ours = tuned_weight(weight, args, None, global_scale).quantized().scale
    assert torch.equal(ours.flatten(), theirs.float())


@pytest.mark.parametrize("name", SCHEMES)
def test_search_lowers_the_weighted_error(name):
    weight, args = weights_of(0, "normal", 48, 96) ** 3, args_of(name)
    importance = torch.rand(96) ** 4 + 0.01
    global_scale = torch.tensor([448 * 6 / weight.abs().max()]) if name == "nvfp4" else None

    def error(initial):
        ours = tuned_weight(weight, args, initial, global_scale).quantized().dequantize()
        errors = importance * (ours - weight).square()
        return weight_spec(args).grouping(weight.shape).split(errors).sum(-1)

    before = error(None)
    after = error(search_range(weight, args, importance, global_scale))
    assert (after <= before * (1 + 1e-5)).all()
    if name != "mxfp8":  # another exponent gains nothing where the numbers have eight of their own
        assert after.sum() < before.sum()


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_the_smooth_surrogate(name):
    """
    By V, alpha, beta and through them the scale, against central differences in float64 of the
    same function without rounding; V moves each weight onto a number, where the two are equal.
    """
    weight, args = weights_of(1, "normal", 48, 96), args_of(name)
    grid, groups = (
        weight_spec(args).grid(torch.float32),
        weight_spec(args).grouping(weight.shape).split(weight),
    )
    low, high = (0.8 * bound for bound in observed_range(groups))  # cuts some weights off
    one_global = 448 * 6 / weight.abs().max()
    global_scale = one_global.expand(len(groups)) if name == "nvfp4" else None
    alpha, beta = 0.9 + 0.1 * torch.rand(2, len(groups))
    limit = grid.element.max_value

    steps, scale, _ = grid.quantize(groups, low, high, global_scale, None, alpha, beta)
    x = groups / grid.effective_scale(scale, global_scale)
    unit = grid.element.step(x)
    rounding = (steps - x) / unit
    cut_off = x.abs() > 1.05 * limit
    rounding[cut_off] = 0
    # At the very end of the range the gradient jumps.
    cotangent = torch.randn(groups.shape) * (cut_off | (steps.abs() < limit))

    leaves = [one.clone().requires_grad_() for one in (rounding, alpha, beta)]
    steps, scale, _ = grid.quantize(groups, low, high, global_scale, *leaves)
    (steps * grid.effective_scale(scale, global_scale) * cotangent).sum().backward()

    assert leaves[0].grad.any()
    assert (leaves[1].grad.abs() + leaves[2].grad.abs()).any()

    slope = 2.0**-grid.element.max_exponent if name.startswith("mx") else 1 / limit
    start = grid.effective_scale(scale, global_scale).detach().double()

    def surrogate(rounding, alpha, beta):
        def smooth(alpha, beta):
            return torch.maximum(-low.double() * alpha, high.double() * beta).unsqueeze(-1) * slope

        moved = smooth(alpha, beta) - smooth(leaves[1].detach(), leaves[2].detach())
        s = start + moved
        return ((groups.double() / s + rounding * unit).clamp(-limit, limit) * s * cotangent).sum(
            -1
        )

    h = 1e-6
    point = [leaf.detach().double() for leaf in leaves]
    for index, leaf in enumerate(leaves):
        ends = []
        for sign in (1, -1):
            moved = list(point)
            # of V, one weight of each group at a time would take long: all along one direction
            direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(5))
            moved[index] = moved[index] + sign * h * direction.double()
            ends.append(surrogate(*moved))
        numeric = (ends[0] - ends[1]) / (2 * h)
        ours = (leaf.grad * direction).double()
        ours = ours.sum(-1) if index == 0 else ours
        torch.testing.assert_close(ours, numeric, rtol=2e-3, atol=2e-3 * float(numeric.abs().max()))


@pytest.mark.parametrize("name", SCHEMES)
def test_sign_steps_follow_the_gradient_of_v(name):
    weight, args = weights_of(1, "normal", 48, 96), args_of(name)
    global_scale = torch.tensor([448 * 6 / weight.abs().max()]) if name == "nvfp4" else None
    fmt = tuned_weight(weight, args, None, global_scale)
    fmt.make_trainable(True)
    before = fmt.quantized()
    cotangent = torch.randn(weight.shape)
    fmt.descend(cotangent, torch.tensor(2.0**-6), torch.tensor(0.0))
    scale = before.scale.float().view(-1, 1)
    if global_scale is not None:
        scale = scale / global_scale
    values = fmt.grouping.split(before.values).float()
    element = E2M1 if args.num_bits == 4 else E4M3
    inside = values.abs() < element.max_value
    expected = -(fmt.grouping.split(cotangent) * scale).sign() * 2.0**-6
    if element == E2M1:
        x = (fmt.grouping.split(weight) / scale).abs()
        expected *= torch.where(x < 2, 2.0, torch.where(x < 4, 0.5**0.5, 0.25))
    assert inside.float().mean() > 0.7
    assert torch.equal(fmt.rounding[inside], expected.half()[inside])


@pytest.mark.parametrize("name", SCHEMES)
def test_compiled_and_plain_agree(name):
    weight, args = weights_of(2, "normal", 48, 96).bfloat16(), args_of(name)
    global_scale = None
    if name == "nvfp4":
        global_scale = (448 * 6 / weight.abs().max().float()).view(1)
    importance = torch.rand(weight.shape[1]) ** 4
    formats = [
        tuned_weight(weight, args, None, global_scale, importance, compiled)
        for compiled in (False, True)
    ]
    gradient = torch.randn(weight.shape).bfloat16()
    for fmt in formats:
        fmt.make_trainable(True)
        fmt.descend(gradient, torch.tensor(0.3), torch.tensor(0.0))
    plain, compiled = formats
    assert torch.equal(plain.rounding, compiled.rounding)
    assert torch.equal(plain.dequantize(), compiled.dequantize())
    assert torch.equal(plain.dequantize(), plain.quantized().dequantize())


# ------------------------------------------------------------------ through the modifier

GROUPS = {
    name: {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **fields}}
    for name, fields in SCHEMES.items()
}
UNSEEN = torch.tensor(token_samples(8, 12, seed=99)["input_ids"])


def tuned(scheme: dict, preset: str = "light", **fields):
    fields = {"preset": preset, "ignore": ["lm_head"], "batch_size": 8, **fields}
    data = None if preset == "rtn" else token_samples(64)
    recipe = AutoRoundModifier(config_groups={"group_0": scheme}, **fields)
    return quantize(tiny_llama(), recipe, data)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_tuning_beats_rounding(name):
    kl = {
        preset: sum(
            compare(tiny_llama(), tuned(GROUPS[name], preset, seed=seed), UNSEEN).kl
            for seed in range(runs)
        )
        / runs
        for preset, runs in {"rtn": 1, "opt_rtn": 1, "light": 3}.items()
    }
    assert kl["light"] < min(kl["opt_rtn"], kl["rtn"])


@pytest.mark.parametrize("name", SCHEMES)
def test_saves_and_reloads_what_was_tuned(name, tmp_path):
    model = tuned(GROUPS[name], iters=4)
    expected = {layer: module.weight.clone() for layer, module in quantized_layers(model).items()}
    assert len(expected) == 14
    logits = model(UNSEEN).logits
    model.save_pretrained(tmp_path, save_compressed=True)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(UNSEEN).logits, logits, rtol=0, atol=2e-2)
    for layer, weight in expected.items():
        module = reloaded.get_submodule(layer)
        if hasattr(module, "weight") and module.weight.dtype == weight.dtype:
            assert torch.equal(module.weight, weight), layer


@pytest.mark.parametrize("preset", ["rtn", "light"])
@pytest.mark.parametrize("name", SCHEMES)
def test_saved_codes_are_the_tuned_codes(name, preset, written, tmp_path):
    model = tuned(GROUPS[name], preset, **({"iters": 4} if preset == "light" else {}))
    expected = {layer: written[module][0] for layer, module in quantized_layers(model).items()}
    model.save_pretrained(tmp_path, save_compressed=True)
    tensors = saved_tensors(tmp_path)
    for layer, weight in expected.items():
        numbers, scale = saved_floats(tensors, layer, NUMBERS[E2M1])
        assert torch.equal(numbers, weight.values.float()), layer
        assert torch.equal(scale, weight.scale.float()), layer
        global_scale = tensors.get(f"{layer}.weight_global_scale")
        assert (global_scale is None) == (name != "nvfp4")
        assert global_scale is None or torch.equal(global_scale, weight.global_scale)


def test_fused_layers_share_a_global_scale():
    model = tuned(GROUPS["nvfp4"], "rtn")
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for fused in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        ):
            largest = max(layer.weight.abs().max() for layer in fused)
            scales = {float(layer.weight_global_scale) for layer in fused}
            assert len(scales) == 1
            assert scales.pop() == pytest.approx(448 * 6 / float(largest), rel=0.2)
    first, second = model.model.layers
    assert first.mlp.down_proj.weight_global_scale != second.mlp.down_proj.weight_global_scale


@pytest.mark.parametrize("preset", ["rtn", "opt_rtn", "light"])
def test_fused_layers_share_the_scale_of_the_tensor(preset):
    """vLLM rounds q, k and v, or gate and up, a second time where their scales differ."""
    scheme = GROUPS["fp8 tensor"]
    model = tuned(scheme, preset, **({"iters": 4} if preset == "light" else {}))
    original = tiny_llama()
    for index, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        assert attention.q_proj.weight_scale == attention.k_proj.weight_scale
        assert attention.q_proj.weight_scale == attention.v_proj.weight_scale
        assert mlp.gate_proj.weight_scale == mlp.up_proj.weight_scale
        assert mlp.gate_proj.weight_scale != mlp.down_proj.weight_scale
        largest = float(original.model.layers[index].mlp.down_proj.weight.abs().max())
        factor = float(mlp.down_proj.weight_scale) * E4M3.max_value / largest
        assert 0.49 < factor < 1.51
        assert preset != "rtn" or factor == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "mxfp4a16", "MXFP8A16"])
def test_presets_of_the_library_by_name(scheme):
    recipe = AutoRoundModifier(preset="rtn", scheme=scheme, ignore=["lm_head"])
    model = quantize(tiny_llama(), recipe)
    assert 0 < compare(tiny_llama(), model, UNSEEN).kl < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 4, "strategy": "tensor_group", "group_size": 32}, "the format fixes 16"),
        (SCHEMES["mxfp4"] | {"group_size": 16}, "the format fixes 32"),
        ({"num_bits": 4, "strategy": "channel"}, "use 8 bits, or 4 bits"),
        (SCHEMES["nvfp4"] | {"scale_dtype": "torch.uint8"}, "NVFP4 has `torch.float8_e4m3fn`"),
        (SCHEMES["mxfp4"] | {"strategy": "channel", "group_size": None}, "use `group`"),
    ],
)
def test_refuses_what_no_format_has(fields, message):
    scheme = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **fields}}
    with pytest.raises(SchemeError, match=message):
        tuned(scheme, "rtn")


def test_refuses_layers_that_do_not_fit():
    scheme = GROUPS["nvfp4"] | {"targets": ["Embedding"]}
    with pytest.raises(SchemeError, match=r"embeddings take integers only.*embed_tokens"):
        tuned(scheme, "rtn")
    recipe = AutoRoundModifier(preset="rtn", scheme="MXFP4A16", ignore=["lm_head"])
    with pytest.raises(SchemeError, match=r"the model is in torch.float16; load it in bfloat16"):
        quantize(tiny_llama(torch.float16), recipe)


def test_the_global_scale_is_that_of_smoothed_weights():
    """In one pass SmoothQuant changes the weights of a block after that pass has begun."""
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.8),
        AutoRoundModifier(
            preset="opt_rtn", config_groups={"group_0": GROUPS["nvfp4"]}, ignore=["lm_head"]
        ),
    ]
    model = quantize(tiny_llama(), recipe, token_samples(64), pipeline="sequential")
    for name, layer in quantized_layers(model).items():
        assert (layer.weight_scale == E4M3.max_value).float().mean() < 0.2, name
