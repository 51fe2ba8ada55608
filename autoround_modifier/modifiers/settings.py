"""The fields of `AutoRoundModifier`: pydantic models, independent of any session and model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, field_validator, model_validator

from autoround_modifier.activations import DEFAULT_OBSERVER, needs_calibration
from autoround_modifier.host.lifecycle import QuantizationMixin
from autoround_modifier.host.schemes import QuantizationScheme, is_preset_scheme, scheme_names
from autoround_modifier.presets import PRESET_FIELDS, PRESETS
from autoround_modifier.tuning import TuningConfig

__all__ = ["SchemeSettings", "TuningSettings", "reason_for_calibration"]


class TuningSettings(BaseModel):
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
    seed: int = Field(default=42, description="fixes every random choice")

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset `{value}`; use one of {', '.join(PRESETS)}")
        return value

    @model_validator(mode="after")
    def _resolve_preset(self) -> TuningSettings:
        preset = PRESETS[self.preset]
        for name in PRESET_FIELDS:
            if getattr(self, name) is None:
                setattr(self, name, getattr(preset, name))
        if self.iters and not self.num_calibration_samples:
            raise ValueError(
                f"iters is {self.iters} but num_calibration_samples is 0; tuning needs samples"
            )
        return self

    def tuning_config(self) -> TuningConfig:
        """:return: the fields that the tuner reads"""
        names = TuningConfig.__dataclass_fields__
        return TuningConfig(**{name: getattr(self, name) for name in names})


class SchemeSettings(QuantizationMixin):
    """What layers are quantized to: the fields of LLM-Compressor's `QuantizationMixin`."""

    engine: Literal["any", "vllm", "transformers", "none"] = Field(
        default="any",
        description="which engine must load the checkpoint: `vllm`, `transformers`, `any` of them, "
        "or `none`. A recipe whose checkpoint it would not load, or would load as another model, "
        "is refused before the run; problems of an engine that is not named are logged",
    )

    @field_validator("scheme", mode="before")
    @classmethod
    def _known_scheme(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value or ():
            if not is_preset_scheme(name):
                raise ValueError(
                    f"unknown scheme `{name}`; use one of {', '.join(scheme_names())}, or "
                    "`config_groups`"
                )
        return value

    @field_validator("config_groups", "kv_cache_scheme")
    @classmethod
    def _observe_the_whole_range(cls, value: Any) -> Any:
        _set_default_observer(value.values() if isinstance(value, dict) else [value])
        return value

    @model_validator(mode="after")
    def _refuse_fields_without_effect(self) -> SchemeSettings:
        for name in ("weight_observer", "output_observer", "bypass_divisibility_checks"):
            if getattr(self, name):
                raise ValueError(f"`{name}` has no effect on AutoRoundModifier; remove it")
        if set(self.observer or ()) - {"input"}:
            raise ValueError(
                "AutoRoundModifier has no observers of weights and outputs; use `observer: {input: "
                "...}` or `input_observer`"
            )
        return self

    @property
    def has_schemes(self) -> bool:
        """Whether the recipe says how layers are quantized."""
        return self.scheme is not None or self.config_groups is not None

    def assign_schemes(self, config_groups: dict[str, Any], ignore: list[str]) -> None:
        """
        Called before `on_initialize`, where the recipe leaves the schemes open.

        :param config_groups: as in a recipe
        :param ignore: as in a recipe; added to what the modifier ignores
        """
        groups = {
            name: QuantizationScheme.model_validate(group) for name, group in config_groups.items()
        }
        _set_default_observer(groups.values())
        self.config_groups = groups
        self.add_ignored(ignore)

    def add_ignored(self, names: list[str]) -> None:
        """Ignore more layers."""
        self.ignore = list(dict.fromkeys([*self.ignore, *names]))
        self._resolved_config = None

    def has_static_activations(self) -> bool:
        """:return: whether a scale of activations or of the key-value cache needs data"""
        groups = self.resolved_config.config_groups.values()
        return self.kv_cache_scheme is not None or any(
            needs_calibration(scheme.input_activations) for scheme in groups
        )


def reason_for_calibration(tuning: TuningSettings, schemes: SchemeSettings) -> str:
    """:return: why calibration data is needed, for messages"""
    if not (tuning.iters or tuning.scale_search):
        return "a static scale of activations"
    reason = f"`iters: {tuning.iters}`" if tuning.iters else "`scale_search: true`"
    return reason if schemes.has_static_activations() else f"{reason} (`preset: rtn` needs none)"


def _set_default_observer(schemes: Iterable[Any]) -> None:
    """
    Observe the whole range where no observer is named. LLM-Compressor's default is a moving
    average of which the first batch makes up most; then results depend on batch size and order.

    :param schemes: `QuantizationScheme` or `QuantizationArgs` of activations, or None; updated
    """
    for scheme in schemes:
        args = getattr(scheme, "input_activations", scheme)
        if args is not None and needs_calibration(args) and args.observer is None:
            args.observer = DEFAULT_OBSERVER
