"""How scales are trained end to end: the fields of `ScaleDistillationModifier`."""

from __future__ import annotations

from pydantic import BaseModel, Field

__all__ = ["DistillationFields"]


class DistillationFields(BaseModel):
    """How scales are trained end to end: the fields of `ScaleDistillationModifier`."""

    iters: int = Field(default=50, ge=1, description="training steps")
    lr: float = Field(
        default=0.005,
        gt=0,
        description="step size of the scales, relative to their mean size in each layer; Adam, "
        "cosine decay",
    )
    norm_lr: float | None = Field(
        default=None,
        ge=0,
        description="the same for the gains of norms and the biases of all layers; 0 leaves them "
        "alone. Default: half of `lr`",
    )
    batch_size: int = Field(
        default=4,
        ge=1,
        description="calibration batches in each step, as `oneshot` delivers them (of one sample "
        "by default)",
    )
    num_calibration_samples: int = Field(
        default=128, ge=1, description="largest number of those batches to train on"
    )
    position_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the positions of each sample whose predictions are compared, evenly "
        "spaced. The head runs on these alone: with a large vocabulary it is most of the work",
    )
    gradient_checkpointing: bool = Field(
        default=True,
        description="compute the activations of each block again on the way back, which takes a "
        "quarter more time and a fraction of the memory",
    )
    holdout_fraction: float = Field(
        default=0.125,
        ge=0,
        le=0.5,
        description="share of the batches on which the result is judged; they are not trained on. "
        "With 0, or a single batch, it is judged on what it was trained on",
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="fixes every random choice")
