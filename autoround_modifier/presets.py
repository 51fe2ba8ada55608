"""Settings by name, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["PRESETS", "PRESET_FIELDS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """
    :param iters: sign-gradient steps per block; 0 tunes nothing
    :param num_calibration_samples: calibration samples tuned on, 0 for none
    :param lr: step size of V; None for ``1 / iters`` (see `tuning.optimizer.default_lr`)
    :param scale_search: search each group's scale before tuning, weighted by the importance of
        its input channels (SignRoundV2)
    :param loss: what tuning minimises, a name in `tuning.loss.LOSSES`
    """

    iters: int
    num_calibration_samples: int
    lr: float | None = None
    scale_search: bool = True
    loss: str = "balanced"


# Iterations and samples are those of the published recipes. The published `light` has lr 5e-3: too
# timid to get anywhere in 50 steps at 2 bits (docs/benchmarks/ablation.md).
PRESETS: dict[str, Preset] = {
    "best": Preset(iters=1000, num_calibration_samples=512),
    "default": Preset(iters=200, num_calibration_samples=128),
    "light": Preset(iters=50, num_calibration_samples=128),
    "opt_rtn": Preset(iters=0, num_calibration_samples=128),
    "rtn": Preset(iters=0, num_calibration_samples=0, scale_search=False),
}

PRESET_FIELDS = tuple(field.name for field in fields(Preset))
