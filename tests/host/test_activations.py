"""host/activations.py: activations as compressed-tensors quantizes and LLM-Compressor observes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from compressed_tensors.modeling import kvcache
from compressed_tensors.quantization import QuantizationArgs
from conftest import tiny_llama

from autoround_modifier.host import activations

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
NVFP4 = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=16,
    dynamic="local",
    scale_dtype=torch.float8_e4m3fn,
)


@pytest.mark.parametrize("which", ["k", "v"])
def test_hooks_on_what_attention_caches(which):
    model = tiny_llama(num_layers=1)
    attention = model.model.layers[0].self_attn
    assert not activations.has_quantized_cache(attention)
    kvcache.initialize_hooked_kv_cache(model, attention)
    assert activations.has_quantized_cache(attention)
    assert not activations.has_quantized_cache(model.model.layers[0].mlp)

    seen = []

    def hook(module, states):
        assert module is attention
        seen.append(states.shape)
        return torch.zeros_like(states)

    tokens = torch.arange(6).view(2, 3)
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        handle = activations.HOOK_REGISTRARS[which](attention, hook)
        changed = model(tokens, use_cache=False).logits
        handle.remove()
        after = model(tokens, use_cache=False).logits
    assert seen == [(2, 2, 3, 16)]  # (batch, key-value heads, tokens, head_dim)
    assert not torch.equal(changed, before)
    assert torch.equal(after, before)


def test_names_of_observers():
    names = activations.observer_names()
    assert {"static_minmax", "memoryless_minmax", "minmax", "mse"} <= set(names)


def test_an_observer_collects_and_gives_scales():
    args = QuantizationArgs(**INT8, strategy="tensor")
    observer = activations.new_observer("static_minmax", "input", args)
    assert not observer.has_statistics
    observer(torch.tensor([[[-1.0, 3.0]]]))
    observer(torch.tensor([[[-4.0, 2.0]]]))
    assert observer.has_statistics
    assert (observer.min_vals.item(), observer.max_vals.item()) == (-4.0, 3.0)
    found = activations.observer_scales(observer)
    assert found.keys() == {"scale", "zero_point", "global_scale"}
    assert found["scale"].tolist() == pytest.approx([4 / 127.5])
    assert found["zero_point"].tolist() == [0]
    assert found["global_scale"] is None
    assert not observer.has_statistics  # scales can be taken once


def test_how_processes_combine_statistics():
    args = QuantizationArgs(**INT8, strategy="tensor")

    def reductions(name: str) -> dict:
        observer = activations.new_observer(name, "input", args)
        return activations.observer_reductions(observer)

    minima_and_maxima = {"min_vals": dist.ReduceOp.MIN, "max_vals": dist.ReduceOp.MAX}
    assert reductions("static_minmax") == minima_and_maxima
    assert reductions("memoryless_minmax") == {}
    assert set(reductions("minmax").values()) == {dist.ReduceOp.AVG}


def test_each_token_has_a_dynamic_scale_in_three_dimensions_only():
    args = QuantizationArgs(**INT8, strategy="token", dynamic=True)
    x = torch.tensor([[[1.0, -2.0], [4.0, 0.0]]])
    scale, zero_point = activations.compute_dynamic_scales_and_zp(x, args, None, None)
    assert scale.shape == zero_point.shape == (1, 2, 1)
    assert scale.flatten().tolist() == pytest.approx([2 / 127.5, 4 / 127.5])
    # Two dimensions are taken for (batch, tokens), and get one scale for all.
    scale, _ = activations.compute_dynamic_scales_and_zp(x[0], args, None, None)
    assert scale.numel() == 1


def test_dynamic_scales_of_groups_under_a_global_scale():
    x = torch.linspace(-6, 6, 32).view(1, 1, 32)
    global_scale = activations.generate_gparam(x.min().view(1), x.max().view(1))
    assert global_scale.tolist() == [448 * 6 / 6]
    assert global_scale.shape == (1,)
    scale, _ = activations.compute_dynamic_scales_and_zp(x, NVFP4, None, global_scale)
    assert scale.shape == (1, 1, 2)
    assert torch.equal(scale, scale.to(torch.float8_e4m3fn).float())
    quantized = activations.fake_quantize(x, scale, None, NVFP4, global_scale)
    assert (quantized - x).abs().max() <= 1.0  # half of the step at 6


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (QuantizationArgs(**INT8), (-128, 127)),
        (QuantizationArgs(**FP8), (-448, 448)),
        (NVFP4, (-6, 6)),
    ],
)
def test_ranges(args, expected):
    low, high = activations.calculate_range(args, torch.device("cpu"))
    assert (low.item(), high.item()) == expected


def test_static_scales_and_what_they_do():
    args = QuantizationArgs(num_bits=8, type="int", symmetric=False, strategy="tensor")
    scale, zero_point = activations.calculate_qparams(
        torch.tensor([-1.0]), torch.tensor([4.1]), args
    )
    assert scale.tolist() == pytest.approx([5.1 / 255])
    assert (zero_point.dtype, zero_point.tolist()) == (torch.int8, [-78])
    x = torch.tensor([[[-1.0, 0.0, 0.011, 4.1, 9.0]]])
    quantized = activations.fake_quantize(x, scale, zero_point, args)
    assert quantized.flatten().tolist() == pytest.approx([-1.0, 0.0, 0.02, 4.1, 4.1])

    args = QuantizationArgs(**FP8, strategy="tensor")
    scale, _ = activations.calculate_qparams(torch.tensor([-1.0]), torch.tensor([448.0]), args)
    quantized = activations.fake_quantize(torch.tensor([[[17.0, 500.0]]]), scale, None, args)
    assert (scale.item(), quantized.flatten().tolist()) == (1.0, [16.0, 448.0])
