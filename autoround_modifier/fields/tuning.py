"""How weights are tuned: fields of `AutoRoundModifier`."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, BaseModel, Field, field_validator, model_validator

from autoround_modifier.presets import PRESET_FIELDS, PRESETS

__all__ = ["TuningFields"]


class TuningFields(BaseModel):
    """How weights are tuned. A field that is given overrides its preset."""

    preset: str = Field(
        default="default",
        description="`best` (1000 iterations, 512 samples), `default` (200, 128), `light` (50, "
        "128), `opt_rtn` (scale search, no tuning) or `rtn` (rounding to nearest; data only for "
        "static scales of activations)",
    )
    iters: int | None = Field(
        default=None,
        ge=0,
        description="sign-gradient steps per group of blocks; 0 tunes nothing. Default: the "
        "preset's",
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        description="step size of V, the learned offset before rounding, in integer steps; it "
        "decays linearly to 0. Default: `1 / iters`. With `scale_search` this is the step of the "
        "median channel; the steps of other channels are scaled by 1/8 to 8, and important "
        "channels take smaller ones. MXFP4 and NVFP4 take twice the step for small weights and a "
        "smaller one for large weights",
    )
    minmax_lr: float | None = Field(
        default=None,
        gt=0,
        description="step size of the clipping factors alpha and beta. Default: `lr` without "
        "`scale_search`, `lr / 2^(num_bits - 2)` with it",
    )
    batch_size: int = Field(default=8, ge=1, description="calibration samples in each batch")
    gradient_accumulate_steps: int = Field(default=1, ge=1, description="batches in each step")
    num_calibration_samples: int | None = Field(
        default=None,
        ge=0,
        description="largest number of calibration samples to tune on; the importance of input "
        "channels, and static scales where nothing is tuned, use all that the pipeline runs. "
        "Default: the preset's",
    )
    scale_search: bool | None = Field(
        default=None,
        description="start from the best scale of a search that weights errors by the importance "
        "of their input channel, and tune it within [0, 2] of that (SignRoundV2, "
        "https://arxiv.org/abs/2512.04746). `false` starts from the minimum and maximum of each "
        "group, tuned within [0, 1]; with `loss: mse` that is SignRound as first published, for "
        "integers. Default: the preset's",
    )
    loss: Literal["balanced", "mse", "filtered"] | None = Field(
        default=None,
        description="what tuning minimizes between a block's output and the full-precision one: "
        "`balanced`, the squared error relative to the output's squared length, of each token and "
        "of the whole sample; `mse`, the mean squared error (SignRound); `filtered`, the same "
        "without the largest 0.1 % of the differences (SignRoundV2, for less than 4 bits). "
        "Default: the preset's",
    )
    enable_minmax_tuning: bool | None = Field(
        default=None,
        description="learn alpha and beta, not only V. Default: for integers only. Never where the "
        "whole tensor has one scale",
    )
    enable_quanted_input: bool = Field(
        default=True,
        validation_alias=AliasChoices(
            "enable_quanted_input", "enable_quantized_input", "quantized_input"
        ),
        description="feed each block the output of the quantized blocks before it, not that of "
        "the full-precision ones. `enable_quantized_input` is the same field",
    )
    holdout_fraction: float = Field(
        default=0.125,
        ge=0,
        le=0.5,
        description="share of the samples on which candidates are compared; they are never tuned "
        "on. 0 compares on the samples that are tuned on",
    )
    holdout_evaluations: int = Field(
        default=5,
        ge=1,
        description="number of candidates compared, evenly spaced, the last step among them",
    )
    enable_torch_compile: bool | None = Field(
        default=None,
        description="quantize by compiled code while tuning; the results are the same. Default: "
        "where there is enough to tune to make up for the time that compiling takes",
    )
    offload_device: Literal["auto", "none", "cpu"] = Field(
        default="auto",
        description="where the calibration samples of a block are kept while it is tuned: `none`, "
        "on the accelerator; `cpu`, on the host, from where each step copies its batch; `auto`, on "
        "the accelerator from the second block on, if they fit beside what tuning the first took, "
        "else on the host, as in several processes and where blocks are tuned together. The result "
        "is the same",
    )
    min_expert_tokens: int = Field(
        default=32,
        ge=0,
        description="experts of a mixture that receive fewer calibration tokens are quantized by "
        "the scale search alone, with all input channels weighted alike",
    )
    checkpoint_dir: str | None = Field(
        default=None,
        exclude=True,
        description="folder that keeps each finished block. The same run, started again after an "
        "interruption, continues after the last of them with the same result, on another machine "
        "with slightly other integers. One process at a time uses the folder. It is left as it is "
        "at the end: delete it once the model is saved",
    )
    mtp: Literal["keep", "drop"] = Field(
        default="keep",
        description="layers for multi-token prediction, which Transformers does not load: `keep` "
        "copies them from the source in 16 bits, `drop` leaves them out. A target that matches "
        "only such layers quantizes them by the scale search",
    )
    strict: bool = Field(
        default=False,
        description="raise if the loss or a gradient has NaN or infinity; otherwise such a block "
        "keeps the rounding it started from, with a warning",
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="fixes every random choice")

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset `{value}`; use one of {', '.join(PRESETS)}")
        return value

    @model_validator(mode="after")
    def _resolve_preset(self) -> TuningFields:
        preset = PRESETS[self.preset]
        for name in PRESET_FIELDS:
            if getattr(self, name) is None:
                setattr(self, name, getattr(preset, name))
        if self.iters and not self.num_calibration_samples:
            raise ValueError(
                f"iters is {self.iters} but num_calibration_samples is 0; tuning needs samples"
            )
        return self
