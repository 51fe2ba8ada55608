"""How far a quantized model is from its original: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Divergence", "compare", "next_token_logits"]


@dataclass(frozen=True)
class Divergence:
    """
    Means over all predicted tokens.

    :param kl: Kullback-Leibler divergence from the original's next-token distribution, in nats
    :param top1: share of tokens at which both models rank the same token first
    :param perplexity: of the quantized model
    :param reference_perplexity: of the original
    :param kl_per_sample: the divergence of each sample
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    kl_per_sample: tuple[float, ...]


@torch.no_grad()
def next_token_logits(model: nn.Module, samples: Tensor, batch_size: int = 8) -> list[Tensor]:
    """
    :param samples: (samples, tokens), token ids
    :param batch_size: samples in each forward pass
    :return: one (tokens - 1, vocabulary) tensor per sample in the model's dtype, on the CPU
    """
    device = next(model.parameters()).device
    return [
        logits[:-1].cpu()
        for batch in samples.split(batch_size)
        for logits in model(input_ids=batch.to(device), use_cache=False).logits
    ]


@torch.no_grad()
def compare(reference: nn.Module | list[Tensor], model: nn.Module, samples: Tensor) -> Divergence:
    """
    :param reference: the original model, or its `next_token_logits` these samples
    :param model: the quantized model
    :param samples: (samples, tokens), token ids of text that calibration never saw
    """
    if isinstance(reference, nn.Module):
        reference = next_token_logits(reference, samples)
    totals = torch.zeros(len(samples), 4, dtype=torch.float64)
    rows = zip(samples, reference, next_token_logits(model, samples), strict=True)
    for index, (sample, wanted, got) in enumerate(rows):
        p, q = (F.log_softmax(logits.float(), dim=-1) for logits in (wanted, got))
        labels = sample[1:, None].cpu()
        totals[index] = torch.stack(
            [
                (p.exp() * (p - q)).sum(),
                (p.argmax(-1) == q.argmax(-1)).sum(),
                -q.gather(-1, labels).sum(),
                -p.gather(-1, labels).sum(),
            ]
        ).double()
    means = totals / (samples.shape[1] - 1)
    kl, top1, nll, reference_nll = means.mean(0).tolist()
    return Divergence(kl, top1, math.exp(nll), math.exp(reference_nll), tuple(means[:, 0].tolist()))
