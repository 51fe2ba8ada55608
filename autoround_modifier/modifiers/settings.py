"""The fields of `AutoRoundModifier` with what follows from them, independent of any session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import PrivateAttr, field_validator, model_validator

from autoround_modifier.activations import DEFAULT_OBSERVER, needs_calibration
from autoround_modifier.fields import SchemeFields, TuningFields
from autoround_modifier.fields.expressions import checked_expressions
from autoround_modifier.gguf_schemes import GGUF_SCHEMES, GGUF_TYPES, gguf_scheme
from autoround_modifier.host.lifecycle import QuantizationMixin
from autoround_modifier.host.schemes import (
    QuantizationConfig,
    QuantizationScheme,
    is_preset_scheme,
    scheme_names,
)
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

    _gguf_types: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("scheme", mode="before")
    @classmethod
    def validate_scheme(cls, value: Any) -> Any:
        """In place of LLM-Compressor's, which knows no types of GGUF."""
        if gguf_scheme(value) is not None:
            return gguf_scheme(value)
        for name in [value] if isinstance(value, str) else value or ():
            if gguf_scheme(name) is not None:
                raise ValueError(f"`{name}` stands alone: write `scheme: {gguf_scheme(name)}`")
            if not is_preset_scheme(name):
                raise ValueError(
                    f"unknown scheme `{name}`; use one of {', '.join(scheme_names())}, "
                    f"{', '.join(GGUF_SCHEMES)}, or `config_groups`"
                )
        if isinstance(value, dict):
            return {name: [x] if isinstance(x, str) else x for name, x in value.items()}
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

    @model_validator(mode="after")
    def _refuse_what_gguf_cannot_have(self) -> SchemeSettings:
        if self.gguf_scheme is None:
            return self
        if self.config_groups is not None:
            raise ValueError(f"`scheme: {self.scheme}` and `config_groups` exclude each other")
        if self.kv_cache_scheme is not None:
            raise ValueError(
                f"`scheme: {self.scheme}`: a GGUF file has no quantized key-value cache; remove "
                "`kv_cache_scheme`"
            )
        return self

    @property
    def gguf_scheme(self) -> str | None:
        """The scheme, if it is one of GGUF."""
        return gguf_scheme(self.scheme)

    def set_gguf_types(self, types: dict[str, str]) -> None:
        """
        Called once the model is known.

        :param types: layer -> name of its type, of all layers to tune
        """
        self._gguf_types = dict(types)
        self._resolved_config = None

    def resolve_quantization_config(self) -> QuantizationConfig:
        """
        Layers that are tuned in a type of GGUF have a scheme of integers while they are: a carrier,
        which is removed before the model is saved. Before the model is known, all have that of the
        type that the scheme means in general.
        """
        scheme = self.gguf_scheme
        if scheme is None:
            return super().resolve_quantization_config()
        targets: dict[str, list[str]] = {}
        for name, kind in self._gguf_types.items():
            targets.setdefault(kind, []).append(name)
        if not targets:
            targets = {GGUF_SCHEMES[scheme]: list(self.targets)}
        groups = {
            f"group_{index}": QuantizationScheme(targets=names, weights=GGUF_TYPES[kind].carrier())
            for index, (kind, names) in enumerate(targets.items())
        }
        return QuantizationConfig(config_groups=groups, ignore=self.ignore)

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
