"""GSQ and its GPTQ, which the benchmarks compare with (benchmarks/gsq.py)."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from conftest import ROOT, quantize, tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from helpers import integers, quantized_layers
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from autoround_modifier import AutoRoundModifier
from autoround_modifier.modifiers import block_quantizer

sys.path.insert(0, str(ROOT / "benchmarks"))

from gptq_start import gptq, signed_scales
from gsq import GSQTuner, gsq
from gsq_settings import GSQSettings
from gsq_weight import GumbelNoise, Optimization, RelaxedWeight, lion
from peers import PEERS, Task

ROWS, COLUMNS, GROUP = 24, 64, 16


def correlated_problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = torch.randn(500, COLUMNS, generator=generator) @ mix
    return weight, inputs.T @ inputs


def scaled(integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return integers * scales.repeat_interleave(COLUMNS // scales.shape[1], 1)


def error(weight, integers, scales, hessian) -> float:
    difference = scaled(integers, scales) - weight
    return ((difference @ hessian) * difference).sum().item()


def noise() -> GumbelNoise:
    return GumbelNoise(2**16, torch.Generator().manual_seed(0))


def relaxed(num_bits: int = 2, **settings) -> tuple[RelaxedWeight, torch.Tensor, torch.Tensor]:
    weight, hessian = correlated_problem()
    start = gptq(weight, hessian, num_bits, GROUP)
    return RelaxedWeight(*start, num_bits, noise(), **settings), *start


# ------------------------------------------------------------------ GPTQ


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_gptq_gives_the_integers_of_llm_compressor(num_bits):
    weight, hessian = correlated_problem()
    scales = weight.unflatten(1, (-1, GROUP)).abs().amax(-1) / (2 ** (num_bits - 1) - 0.5)
    args = QuantizationArgs(
        num_bits=num_bits, symmetric=True, strategy="group", group_size=GROUP, actorder=None
    )
    theirs, _, fallback = quantize_weight(
        weight.clone()[None],
        hessian.clone()[None],
        scales[None],
        torch.zeros_like(scales)[None],
        None,
        args,
        blocksize=32,
        percdamp=0.1,
    )
    assert not fallback.any()
    ours, _ = gptq(weight, hessian, num_bits, GROUP, damping=0.1, scales=scales)
    torch.testing.assert_close(scaled(ours, scales), theirs[0])
    nearest = (weight / scales.repeat_interleave(GROUP, 1)).round()
    nearest = nearest.clamp(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)
    assert error(weight, ours, scales, hessian) < 0.7 * error(weight, nearest, scales, hessian)


def test_gptq_leaves_out_channels_without_input():
    weight, hessian = correlated_problem()
    hessian[5] = hessian[:, 5] = 0
    found, _ = gptq(weight, hessian, 2, GROUP)
    assert (found[:, 5] == 0).all()
    assert (found[:, 4] != 0).any()


def test_scales_may_be_negative_and_are_the_best_of_those_tried():
    groups = torch.tensor([[2.0, 1.0, -1.0, 0.0], [-4.0, -2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # Levels -2 to 1: the first group needs a negative scale. 4 / 3 * (1 - i / 4) is 1 for i = 1.
    assert signed_scales(groups, 2, candidates=4).tolist()[:2] == [-1.0, 2.0]
    assert signed_scales(groups, 2, candidates=4)[2] != 0


# ------------------------------------------------------------------ the relaxed weight


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_likeliest_integers_are_those_of_gptq_at_first(num_bits):
    # The noise of the initial logits has the standard deviation `std`, and moves some already.
    weight = RelaxedWeight(*relaxed(num_bits)[1:], num_bits, noise())
    start = relaxed(num_bits)[1]
    moved = (weight.hard()[0] != start).float().mean().item()
    assert 0 < moved < 0.06
    distinct, start, scales = relaxed(num_bits, strength=600.0)
    assert torch.equal(distinct.hard()[0], start)
    assert torch.equal(distinct.hard()[1], scales)


def test_initial_logits_by_hand():
    weight = RelaxedWeight(torch.tensor([[-1.0]]), torch.ones(1, 1), 2, noise(), std=1e-9)
    # -0.5 (q - v)^2 for the levels -2, -1, 0, 1 is -0.5, 0, -0.5, -2, of mean -0.75
    expected = torch.tensor([0.25, 0.75, 0.25, -1.25]) * 6
    torch.testing.assert_close(weight.logits.flatten() * 1e9, expected, atol=4.0, rtol=0)
    strong = RelaxedWeight(torch.tensor([[-1.0]]), torch.ones(1, 1), 2, noise(), 1e-9, 6e9)
    torch.testing.assert_close(strong.logits.flatten(), expected, atol=1e-5, rtol=0)


def test_three_bits_reach_two_levels_and_stay_in_range():
    weight = RelaxedWeight(torch.tensor([[-4.0, 0.0, 3.0]]), torch.ones(1, 1), 3, noise())
    reachable = weight.logits.isfinite().squeeze(1).T.tolist()
    assert reachable == [
        [False, False, True, True, True],
        [True, True, True, True, True],
        [True, True, True, False, False],
    ]
    assert weight.sample(2.0, 100.0).isfinite().all()


@pytest.mark.parametrize("num_bits", [2, 3])
def test_without_noise_a_cold_sample_is_the_hard_weight(num_bits):
    weight, *_ = relaxed(num_bits)
    found, scales = weight.hard()
    cold = weight.sample(1e-6, 100.0, noisy=False)
    torch.testing.assert_close(cold, scaled(found, scales), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(weight.sample(2.0, 10.0), scaled(found, scales), atol=0.1)


def test_samples_choose_levels_as_often_as_their_logits_say():
    start = torch.zeros(100, 64)
    weight = RelaxedWeight(start, torch.ones(100, 4), 2, noise(), std=1e-9, strength=2e9)
    chosen = torch.cat([weight.sample(1e-4, 1.0).round() for _ in range(20)]).flatten()
    expected = torch.softmax(weight.logits[:, 0, 0], 0)
    shares = torch.stack([(chosen == level).float().mean() for level in (-2, -1, 0, 1)])
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("num_bits", [2, 3])
def test_gradients_are_those_of_autograd(num_bits):
    weight, start, scales = relaxed(num_bits)
    gradient = torch.randn(ROWS, COLUMNS)
    weight.sample(0.7, 30.0, noisy=False)
    logits = weight.logits.clone().requires_grad_()
    trained_scales = scales.clone().requires_grad_()
    levels = torch.arange(-2.0, 2.0 if num_bits == 2 else 3.0).view(-1, 1, 1)
    base = torch.zeros_like(start) if num_bits == 2 else start
    values = (torch.softmax(logits * 30.0 / 0.7, 0) * levels).sum(0) + base
    scaled(values, trained_scales).backward(gradient)
    # The momentum after one step is the gradient times 1 - b2.
    weight.descend(gradient, Optimization(0.0, 0.0, 0.0, (0.9, 0.5)))
    of_logits, of_scales = weight._momenta
    finite = logits.isfinite()
    torch.testing.assert_close(of_logits[finite], logits.grad[finite] / 2, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(of_scales, trained_scales.grad / 2, rtol=1e-3, atol=1e-4)


def test_lion_by_hand():
    parameter, momentum = torch.tensor([1.0, 1.0, -2.0]), torch.zeros(3)
    lion(parameter, momentum, torch.tensor([3.0, -1.0, 0.0]), 0.1, (0.9, 0.95), weight_decay=1.0)
    torch.testing.assert_close(parameter, torch.tensor([0.9 - 0.1, 0.9 + 0.1, -1.8]))
    torch.testing.assert_close(momentum, torch.tensor([0.15, -0.05, 0.0]))
    # 0.9 * 0.15 - 0.1 * 1 > 0: the old direction still wins; 0.9 * -0.05 + 0.1 > 0: it does not
    lion(parameter, momentum, torch.tensor([-1.0, 1.0, 0.0]), 0.1, (0.9, 0.95))
    torch.testing.assert_close(parameter, torch.tensor([0.7, 0.9, -1.8]))
    torch.testing.assert_close(momentum, torch.tensor([0.0925, 0.0025, 0.0]))


def test_schedules():
    settings = GSQSettings()
    assert settings.sharpness(0, 50) == (2.0, 100.0)
    assert settings.sharpness(49, 50) == pytest.approx((0.05, 500.0))
    published = settings.optimization(0, 3200, 640, cosine=True)
    assert (published.lr, published.scales_lr) == (2e-4, 1e-4)
    # Fewer steps go as far, up to a limit; the cosine ends at a tenth.
    assert settings.optimization(0, 320, 640, cosine=True).lr == pytest.approx(4e-4)
    assert settings.optimization(319, 320, 640, cosine=True).lr == pytest.approx(4e-5)
    assert settings.optimization(319, 320, 640, cosine=False).lr == pytest.approx(4e-4)
    assert settings.optimization(0, 10, 640, cosine=True).lr == 5e-4
    assert GSQSettings(lr=1e-3).optimization(32, 65, 640, True).lr == pytest.approx(
        1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    )
    with pytest.raises(ValueError, match="stages must be one of halves, joint"):
        GSQSettings(stages="all")


# ------------------------------------------------------------------ blocks and models


def tuned(model, num_bits: int = 2, **settings) -> AutoRoundModifier:
    modifier = AutoRoundModifier(
        config_groups={"group_0": weight_scheme(num_bits, group_size=32)},
        ignore=["lm_head"],
        preset="light",
        iters=settings["steps"],
        scale_search=settings.get("start") == "search",
        holdout_fraction=0.0,
        loss="mse",
        batch_size=4,
    )
    tuner = partial(GSQTuner, settings=GSQSettings(**settings))
    with (
        mock.patch.object(block_quantizer, "Tuner", tuner),
        mock.patch("gsq.NOISE_SIZE", 2**17),
    ):
        quantize(model, modifier)
    return modifier


@pytest.mark.parametrize("stages", ["halves", "joint"])
@pytest.mark.parametrize("targets", ["block", "model"])
def test_the_loss_of_blocks_falls_below_that_of_gptq(stages, targets):
    modifier = tuned(tiny_llama(), steps=40, stages=stages, targets=targets)
    assert len(modifier.block_reports) == 2
    for report in modifier.block_reports:
        assert report.best_loss < 0.85 * report.initial_loss


def test_another_start_and_loss():
    modifier = tuned(tiny_llama(), steps=40, start="search", loss="balanced")
    for report in modifier.block_reports:
        assert report.best_loss < 0.95 * report.initial_loss


def test_three_bits():
    for report in tuned(tiny_llama(), 3, steps=40).block_reports:
        assert report.best_loss < report.initial_loss


def test_blocks_of_gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
        pad_token_id=0,
    )
    for report in tuned(Gemma3ForCausalLM(config).bfloat16(), steps=40).block_reports:
        assert report.best_loss < 0.9 * report.initial_loss


def test_the_peer_leaves_quantized_weights(monkeypatch):
    monkeypatch.setattr("gsq.NOISE_SIZE", 2**17)
    model = tiny_llama()
    weights = weight_scheme(2)["weights"]
    task = Task(Path(), model, tiny_tokenizer(), token_samples(), weights, batch_size=4, seed=1)
    assert PEERS["gsq"] is gsq
    settings = gsq(task, steps=2, temperature=[2.0, 0.5])
    assert settings["steps"] == 2
    assert settings["temperature"] == (2.0, 0.5)
    layers = quantized_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        steps = layer.weight.unflatten(1, (-1, 32)) / layer.weight_scale.unsqueeze(-1)
        torch.testing.assert_close(steps.flatten(1).round(), integers(layer).to(steps.dtype))
        assert set(integers(layer).unique().tolist()) <= {-2, -1, 0, 1}


def test_asymmetric_integers_are_refused():
    model = tiny_llama()
    weights = weight_scheme(2, symmetric=False)["weights"]
    task = Task(Path(), model, tiny_tokenizer(), token_samples(), weights, batch_size=4, seed=1)
    with pytest.raises(ValueError, match="symmetric integers only"):
        gsq(task, steps=2)
