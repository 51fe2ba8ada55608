"""How far a quantized model is from its original: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Divergence",
    "TokenStatistics",
    "compare",
    "mean_divergence",
    "next_token_logits",
    "token_statistics",
]

# Rows of logits that are float32 at a time
ROWS = 256
# Samples in a forward pass
LOGITS_BATCH = 8


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


class TokenStatistics(NamedTuple):
    """
    Of one sample, at each predicted token; float64 on the CPU.

    :param kl: (tokens - 1,), divergence between the predictions of the token, in nats
    :param same_top1: (tokens - 1,), 1 where both models rank the same token first, else 0
    :param loss: (tokens - 1,), cross entropy of the quantized model, in nats
    :param reference_loss: (tokens - 1,), of the original
    """

    kl: Tensor
    same_top1: Tensor
    loss: Tensor
    reference_loss: Tensor


@torch.no_grad()
def next_token_logits(
    model: nn.Module, samples: Tensor, batch_size: int = LOGITS_BATCH
) -> list[Tensor]:
    """
    :param samples: (samples, tokens), token ids
    :param batch_size: samples in each forward pass
    :return: one (tokens - 1, vocabulary) tensor per sample in the model's dtype, on the CPU
    """
    return [logits.cpu() for batch in samples.split(batch_size) for logits in _logits(model, batch)]


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    """
    :param batch: (samples, tokens), token ids
    :return: (samples, tokens - 1, vocabulary), on the model's device
    """
    device = next(model.parameters()).device
    return model(input_ids=batch.to(device), use_cache=False).logits[:, :-1]


@torch.no_grad()
def token_statistics(reference: Tensor, logits: Tensor, sample: Tensor) -> TokenStatistics:
    """
    :param reference: (tokens - 1, vocabulary), the original's logits, on any device
    :param logits: (tokens - 1, vocabulary), the quantized model's; computed on their device
    :param sample: (tokens,), token ids
    """
    labels = sample[1:, None].to(logits.device)
    parts = []
    for wanted, got, label in zip(
        reference.split(ROWS), logits.split(ROWS), labels.split(ROWS), strict=True
    ):
        p, q = (F.log_softmax(x.to(logits.device).float(), dim=-1) for x in (wanted, got))
        # A token of probability zero adds nothing, whatever the other model says of it.
        terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
        parts.append(
            torch.stack(
                [
                    terms.sum(-1),
                    (p.argmax(-1) == q.argmax(-1)).float(),
                    -q.gather(-1, label).squeeze(-1),
                    -p.gather(-1, label).squeeze(-1),
                ]
            )
        )
    return TokenStatistics(*torch.cat(parts, dim=1).double().cpu())


def mean_divergence(samples: Sequence[TokenStatistics]) -> Divergence:
    """
    :param samples: of one length or of several
    :return: means in which each predicted token counts the same
    """
    kl, top1, loss, reference_loss = (
        torch.cat(x).mean().item() for x in zip(*samples, strict=True)
    )
    return Divergence(
        kl,
        top1,
        math.exp(loss),
        math.exp(reference_loss),
        tuple(sample.kl.mean().item() for sample in samples),
    )


@torch.no_grad()
def compare(reference: nn.Module | list[Tensor], model: nn.Module, samples: Tensor) -> Divergence:
    """
    :param reference: the original model, or its `next_token_logits` of these samples
    :param model: the quantized model
    :param samples: (samples, tokens), token ids of text that calibration never saw
    """
    if not isinstance(reference, nn.Module):
        rows = zip(reference, next_token_logits(model, samples), samples, strict=True)
        return mean_divergence([token_statistics(*row) for row in rows])
    found = []
    for batch in samples.split(LOGITS_BATCH):  # no more logits exist than those of one batch
        expected, got = (_logits(one, batch) for one in (reference, model))
        found += [token_statistics(*row) for row in zip(expected, got, batch, strict=True)]
    return mean_divergence(found)
