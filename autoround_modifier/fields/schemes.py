"""What layers are quantized to: fields of `AutoRoundModifier`."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, Field, field_validator

from autoround_modifier.fields.expressions import checked_expressions

__all__ = ["ENGINES", "Engine", "SchemeFields"]

Engine: TypeAlias = Literal["any", "vllm", "transformers", "none"]
ENGINES: tuple[str, ...] = get_args(Engine)


class SchemeFields(BaseModel):
    """
    The fields of LLM-Compressor's `QuantizationMixin` that `AutoRoundModifier` uses, and its own.
    LLM-Compressor has the types of its fields; here are their descriptions.
    """

    scheme: str | dict[str, Any] | None = Field(
        default=None,
        description="instead of `config_groups`: a preset of compressed-tensors such as `NVFP4`, "
        "or several, each with its targets; or a scheme of GGUF, such as `gguf:q4_k_m`, for "
        "llama.cpp",
    )
    config_groups: dict[str, Any] | None = Field(
        default=None,
        description="named groups of layers: for each, `targets` and a scheme (`weights`, "
        "`input_activations`)",
    )
    targets: str | list[str] = Field(
        default_factory=lambda: ["Linear"],
        description="layers that `scheme` applies to: class names, module names, or expressions "
        "after `re:`",
    )
    ignore: list[str] = Field(
        default_factory=list, description="layers left alone although they are targets"
    )
    kv_cache_scheme: dict[str, Any] | None = Field(
        default=None, description="quantization of the key-value cache"
    )
    input_observer: str | None = Field(
        default=None,
        description="how static scales of activations are found: `static_minmax` unless given",
    )
    engine: Engine = Field(
        default="any",
        description="which engine must load the checkpoint: `vllm`, `transformers`, `any` of them, "
        "or `none`. A recipe whose checkpoint it would not load, or would load as another model, "
        "is refused before the run; problems of an engine that is not named are logged",
    )

    _expressions = field_validator("targets", "ignore")(checked_expressions)
