"""KL divergence, agreement and perplexity against literal values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from autoround_modifier.evaluation import compare
from autoround_modifier.evaluation.divergence import mean_divergence, token_statistics


class Constant(nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids, use_cache):
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def test_literal_values():
    samples = torch.tensor([[0, 1, 1], [0, 0, 1]])
    result = compare(Constant([0.5, 0.5]), Constant([0.25, 0.75]), samples)
    assert result.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    nll = -(3 * math.log(0.75) + math.log(0.25)) / 4
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(2.0, rel=1e-5)
    assert result.kl_per_sample == pytest.approx([result.kl] * 2)
    same = compare(Constant([0.3, 0.7]), Constant([0.3, 0.7]), samples)
    assert (same.kl, same.top1) == (pytest.approx(0.0, abs=1e-6), 1.0)


def test_samples_of_several_lengths():
    """Each predicted token counts the same."""
    half, quarter = (torch.tensor([p, 1 - p]).log() for p in (0.5, 0.25))
    samples = [torch.tensor([0, 1]), torch.tensor([0, 0, 0, 0])]
    found = mean_divergence(
        [
            token_statistics(half.expand(len(x) - 1, 2), quarter.expand(len(x) - 1, 2), x)
            for x in samples
        ]
    )
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.75) + 3 * math.log(0.25)) / 4))


def test_tokens_that_the_original_excludes():
    """A token of probability zero adds nothing, also where both models exclude it."""
    wanted = torch.tensor([[0.0, 0.0, -math.inf]])
    got = torch.tensor([[0.0, 0.0, -math.inf]])
    assert token_statistics(wanted, got, torch.tensor([0, 1])).kl.item() == pytest.approx(0.0)
