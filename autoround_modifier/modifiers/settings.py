"""The fields of `AutoRoundModifier` with what follows from them, independent of any session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import field_validator, model_validator

from autoround_modifier.activations import DEFAULT_OBSERVER, needs_calibration
from autoround_modifier.fields import SchemeFields, TuningFields
from autoround_modifier.fields.expressions import checked_expressions
from autoround_modifier.host.lifecycle import QuantizationMixin
from autoround_modifier.host.schemes import QuantizationScheme, is_preset_scheme, scheme_names
from autoround_modifier.tuning import TuningConfig

__all__ = ["SchemeSettings", "TuningSettings", "reason_for_calibration"]


class TuningSettings(TuningFields):
    """How weights are tuned."""

    def tuning_config(self) -> TuningConfig:
        """:return: the fields that the tuner reads"""
        names = TuningConfig.__dataclass_fields__
        return TuningConfig(**{name: getattr(self, name) for name in names})


class SchemeSettings(QuantizationMixin, SchemeFields):
    """What layers are quantized to: the fields of LLM-Compressor's `QuantizationMixin`, checked."""

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

    @field_validator("config_groups")
    @classmethod
    def _sound_targets(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for group in (value or {}).values():
            checked_expressions(group.targets)
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
