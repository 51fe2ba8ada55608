"""The tuner's parts: sampling, step sizes, the loss, and which candidate it keeps."""

from __future__ import annotations

from itertools import chain, islice

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from helpers import search_range, tuned_weight
from torch import nn

from autoround_modifier.blocks.forwards import quantized_forwards
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.samples import BlockCall
from autoround_modifier.formats.tuned_weight import SMALLEST_CLIPPING
from autoround_modifier.tuning import Tuner, TuningConfig
from autoround_modifier.tuning.loss import balanced_error, filtered_error, squared_error
from autoround_modifier.tuning.optimizer import SignSGD, default_lr, default_minmax_lr
from autoround_modifier.tuning.sampling import minibatches, split_holdout

ARGS = QuantizationArgs(num_bits=2, symmetric=True, strategy="group", group_size=16)


def test_holdout_is_fixed_and_never_tuned_on():
    train, holdout = split_holdout(16, 0.125, seed=1)
    assert len(holdout) == 2
    assert sorted(train + holdout) == list(range(16))
    assert (train, holdout) == split_holdout(16, 0.125, seed=1)
    assert split_holdout(1, 0.125, seed=1) == ([0], [0])
    assert split_holdout(3, 0.0, seed=1) == ([0, 1, 2], [0, 1, 2])


def test_every_sample_is_drawn_once_in_each_pass():
    batches = list(islice(minibatches(list(range(10, 18)), 4, seed=0), 4))
    for passes in (batches[:2], batches[2:]):
        assert sorted(chain.from_iterable(passes)) == list(range(10, 18))
    assert batches[:2] != batches[2:]
    assert next(minibatches([5], 8, seed=0)) == [5]


def test_step_sizes():
    assert default_lr(200, 4) == 1 / 200
    assert default_lr(1000, 4) == 1 / 1000
    assert default_lr(1000, 3) == 2 / 1000


@pytest.mark.parametrize(
    ("num_bits", "searched", "expected"),
    [(2, True, 0.02), (4, True, 0.005), (8, True, 0.02 / 64), (4, False, 0.02)],
)
def test_step_size_of_clipping(num_bits, searched, expected):
    """From a searched range the largest weight moves by as many integers at all widths."""
    assert default_minmax_lr(0.02, num_bits, searched) == expected
    weight = torch.randn(4, 16)
    args = QuantizationArgs(num_bits=num_bits, symmetric=False, strategy="channel")
    fmt = tuned_weight(weight, args, search_range(weight, args) if searched else None)
    fmt.make_trainable(tune_clipping=True)
    layer = nn.Linear(16, 4)
    SignSGD({layer: fmt}, iters=50).descend(layer, torch.randn(4, 16))
    moved = torch.stack(fmt.clipping) - 1
    torch.testing.assert_close(moved.abs().max(), torch.tensor(expected), rtol=1e-3, atol=0)


def test_sign_steps_decay_to_zero_and_stay_in_the_clipping_limits():
    fmt = tuned_weight(torch.randn(4, 16), ARGS)
    fmt.make_trainable(tune_clipping=True)
    layer = nn.Linear(16, 4)
    optimizer = SignSGD({layer: fmt}, iters=4, lr=0.1, minmax_lr=0.8)
    moved = []
    gradient = torch.randn(4, 16)
    for _ in range(4):
        before = fmt.rounding.clone()
        optimizer.descend(layer, gradient)
        optimizer.end_step()
        moved.append((fmt.rounding - before).abs().max().item())
    assert moved == pytest.approx([0.1, 0.075, 0.05, 0.025], abs=1e-3)
    for factor in fmt.clipping:
        assert factor.min() > 0.0
        assert factor.max() <= 1.0
    # 0.8 + 0.6: beyond the limit
    assert min(factor.min() for factor in fmt.clipping) == SMALLEST_CLIPPING


def test_padding_with_nan_counts_for_nothing():
    output, target = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
    output[0, 2] = float("nan")
    output.requires_grad_()
    mask = torch.tensor([[True, True, False]])
    loss = squared_error(output, target, mask)
    loss.backward()
    assert loss.item() == 2.0
    assert output.grad.tolist() == [[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]]


@pytest.mark.parametrize("padding", [0.0, float("nan")])
def test_balanced_error_sees_ordinary_and_massive_tokens(padding):
    target = torch.tensor([[[3.0, 4.0], [3000.0, 4000.0], [padding, padding]]])
    mask = torch.tensor([[True, True, False]])
    for token, of_sample in ((0, 0.0), (1, 1.0)):
        output = target.clone()
        output[0, token] *= 1.1
        loss = balanced_error(output.requires_grad_(), target, mask)
        loss.backward()
        # Of two tokens one is wrong by a tenth: 1 % of its own energy. The massive one is all of
        # the sample's energy as well, and the sum over tokens counts that share twice.
        assert loss.item() == pytest.approx(0.1**2 * (1 + 2 * of_sample) / 2, rel=1e-3, abs=1e-7)
        assert torch.isfinite(output.grad).all()


def test_balanced_error_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 8, generator=generator)
    mask = torch.rand(3, 5, generator=generator) > 0.3
    together = balanced_error(output, target, mask)
    apart = [
        balanced_error(output[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(apart).sum())


def test_filtered_error_drops_the_largest_thousandth():
    target = torch.zeros(1, 20, 100)
    output = torch.ones(1, 20, 100)
    output[0, 3, 7], output[0, 9, 1] = -500.0, 300.0  # the two of 2,000
    loss = filtered_error(output.requires_grad_(), target, None)
    loss.backward()
    assert loss.item() == pytest.approx((2000 - 2) / 100)
    assert output.grad[0, 3, 7] == output.grad[0, 9, 1] == 0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.linear(x).tanh()


def problem(num_samples: int = 12, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    block = Block().to(dtype)
    mix = torch.randn(32, 32) * torch.logspace(0, -2, 32)[:, None]  # activations are correlated
    inputs = [(torch.randn(1, 24, 32) @ mix).to(dtype) for _ in range(num_samples)]
    with torch.no_grad():
        targets = [block(x) for x in inputs]
    group = BlockGroup([block], [[BlockCall((), {}) for _ in inputs]])
    formats = {block.linear: tuned_weight(block.linear.weight, ARGS)}
    return group, formats, inputs, targets, [None] * num_samples


def test_small_errors_do_not_underflow_in_half_precision():
    group, formats, inputs, targets, masks = problem(2, torch.float16)
    inputs = [x.repeat(1, 400, 1) * 1e-3 for x in inputs]  # many tokens, small outputs
    targets = list(inputs)
    group.advance(targets, 1, {})
    Tuner(group, formats, inputs, targets, masks, TuningConfig(iters=2, batch_size=1, lr=0.5)).run()
    (fmt,) = formats.values()
    assert (fmt.rounding != 0).float().mean() > 0.9


def test_what_is_kept_has_the_reported_loss():
    group, formats, inputs, targets, masks = problem()
    config = TuningConfig(iters=40, batch_size=4)
    result = Tuner(group, formats, inputs, targets, masks, config).run()
    assert result.best_loss < 0.8 * result.initial_loss
    _, holdout = split_holdout(12, config.holdout_fraction, config.seed)
    outputs = list(inputs)
    group.advance(outputs, 4, quantized_forwards(result.weights))
    errors = [(outputs[index] - targets[index]).square().mean() for index in holdout]
    assert torch.stack(errors).mean().item() == pytest.approx(result.best_loss, rel=1e-4)


def test_the_last_iterate_is_a_candidate():
    config = TuningConfig(iters=7, batch_size=4, holdout_evaluations=1)
    result = Tuner(*problem(), config).run()
    assert result.best_iteration == 7


def test_nothing_is_kept_that_is_worse_than_the_start():
    # A huge step only does harm; the initial rounding stays.
    result = Tuner(*problem(), TuningConfig(iters=3, batch_size=4, lr=50.0)).run()
    assert result.best_iteration == 0
    assert result.best_loss == result.initial_loss


def test_batches_and_accumulation_give_the_same_gradient():
    once = Tuner(*problem(), TuningConfig(iters=1, batch_size=10, holdout_evaluations=1)).run()
    twice = Tuner(
        *problem(),
        TuningConfig(iters=1, batch_size=5, gradient_accumulate_steps=2, holdout_evaluations=1),
    ).run()
    for a, b in zip(once.weights.values(), twice.weights.values(), strict=True):
        assert (a.values != b.values).float().mean() < 0.01


def test_block_and_parameters_are_left_as_they_were():
    group, formats, *data = problem()
    (block,) = group.blocks
    weight = block.linear.weight.detach().clone()
    Tuner(group, formats, *data, TuningConfig(iters=3, batch_size=4)).run()
    assert torch.equal(block.linear.weight, weight)
    assert block.linear.weight.requires_grad
    assert block.linear.weight.grad is None
    assert "forward" not in block.linear.__dict__
