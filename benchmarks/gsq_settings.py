"""Settings of GSQ, and its schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gsq_weight import Optimization

from autoround_modifier.tuning.loss import LOSSES

__all__ = ["PUBLISHED_LAYER_STEPS", "PUBLISHED_STEPS", "GSQSettings"]

# What the published step sizes are for: 10 passes over 4096 samples in batches of 64, and for the
# stage without samples a number that the source fixes.
PUBLISHED_STEPS = 640
PUBLISHED_LAYER_STEPS = 2000
PUBLISHED_LR = 2e-4
# Better than 2e-4 and 1e-3 on the first blocks of SmolLM2-135M, with 50 steps of 256 tokens.
LARGEST_LR = 5e-4
MIN_LR = 0.1  # of the first step size, where the cosine ends


@dataclass(frozen=True)
class GSQSettings:
    """
    Defaults are those of the source, except for the numbers of steps.

    :param steps: of each stage that runs samples
    :param layer_steps: of the stage without samples; None for the same number
    :param lr: step size of logits; None for the published 2e-4, or more where a stage has fewer
        steps than the published number, so that logits move as far, but at most 5e-4
    :param scales_lr: step size of scales; None for half of that of the logits
    :param temperature: at the first step and at the last
    :param logit_scale: likewise
    :param std: of the noise in the initial logits, which makes another level than GPTQ's the
        likeliest for one weight of thirty
    :param strength: distance of the initial logits, in units of ``std``
    :param start: ``gptq``, or ``search``: rounding to nearest with this package's searched scales
    :param damping: of GPTQ
    :param scale_candidates: of `signed_scales`
    :param stages: ``halves``, described in ``gsq.py``, or ``joint``
    :param targets: ``block``, outputs of the full-precision block on the quantized blocks' inputs;
        ``model``, those of the full-precision model, as this package's own tuner has
    :param loss: of stages that run samples, a name in `tuning.loss.LOSSES`; GSQ's is ``mse``
    """

    steps: int = 50
    layer_steps: int | None = None
    lr: float | None = None
    scales_lr: float | None = None
    weight_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    temperature: tuple[float, float] = (2.0, 0.05)
    logit_scale: tuple[float, float] = (100.0, 500.0)
    std: float = 0.01
    strength: float = 6.0
    start: str = "gptq"
    damping: float = 0.1
    scale_candidates: int = 25
    stages: str = "halves"
    targets: str = "block"
    loss: str = "mse"

    def __post_init__(self) -> None:
        choices = {
            "start": ("gptq", "search"),
            "stages": ("halves", "joint"),
            "targets": ("block", "model"),
            "loss": tuple(LOSSES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}")

    def sharpness(self, step: int, steps: int) -> tuple[float, float]:
        """:return: temperature and logit scale at a step, both linear from the first to the last"""
        progress = step / max(1, steps - 1)
        temperature, logit_scale = (
            first + (last - first) * progress
            for first, last in (self.temperature, self.logit_scale)
        )
        return temperature, logit_scale

    def optimization(self, step: int, steps: int, published: int, cosine: bool) -> Optimization:
        """
        :param published: number of steps that the published step sizes are for
        :param cosine: false for equal step sizes
        """
        lr = self.lr
        if lr is None:
            lr = min(PUBLISHED_LR * max(1.0, published / steps), LARGEST_LR)
        scales_lr = lr / 2 if self.scales_lr is None else self.scales_lr
        progress = step / max(1, steps - 1)
        factor = MIN_LR + (1 - MIN_LR) * (1 + math.cos(math.pi * progress)) / 2 if cosine else 1.0
        return Optimization(lr * factor, scales_lr * factor, self.weight_decay, self.betas)
