"""What `AutoSchemeModifier` chooses from, and how: its fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, field_validator

from autoround_modifier.fields.expressions import checked_expressions
from autoround_modifier.fields.schemes import Engine

__all__ = ["AutoSchemeFields"]


class AutoSchemeFields(BaseModel):
    """What `AutoSchemeModifier` chooses from, and how: its fields."""

    avg_bits: float = Field(
        gt=0,
        description="largest mean of bits for each weight of the layers, as saved: packed values, "
        "scales, zero points",
    )
    options: list[str | dict[str, Any]] = Field(
        description="schemes to choose from: presets of compressed-tensors such as `MXFP4`, for "
        "integer weights also with zero points and a group size (`W2A16G64`, `W4A16_ASYM_G32`), or "
        "fields of `QuantizationScheme` with a `name`; `UNQUANTIZED` leaves a layer alone"
    )
    targets: str | list[str] = Field(
        default_factory=lambda: ["Linear"],
        description="layers to choose for, as in `AutoRoundModifier`",
    )
    ignore: list[str] = Field(
        default_factory=lambda: ["lm_head"],
        description="layers to leave out, with those that the `AutoRoundModifier` ignores",
    )
    shared_layers: list[list[str]] = Field(
        default_factory=list,
        description="further groups of layers that get one scheme, each a list of targets",
    )
    engine: Engine | None = Field(
        default=None,
        description="which engine must load the checkpoint, as in `AutoRoundModifier`, whose field "
        "is the default. vLLM allows a scheme for the experts of each block, Transformers one for "
        "all experts of the model; either reads experts under some of the schemes only",
    )
    whole_model: bool = Field(
        default=False,
        description="let `avg_bits` be a mean over all parameters of the model, embeddings and "
        "norms included",
    )
    score: str = Field(
        default="fisher",
        description="`fisher`, the divergence to second order, or `delta_loss`, SignRoundV2's "
        "first order of the loss on the text",
    )
    scale_search: bool = Field(
        default=True,
        description="measure with searched scales, not with those of minimum and maximum",
    )
    num_calibration_samples: int = Field(
        default=32, ge=1, description="calibration samples to measure on"
    )
    batch_size: int = Field(
        default=8, ge=1, description="calibration samples in each pass of a block"
    )
    output_dir: str | None = Field(
        default=None,
        description="where to write the scores (`auto_scheme.json`), the recipe without search "
        "(`recipe.yaml`) and, where matplotlib is installed, a picture (`auto_scheme.png`)",
    )
    cache_dir: str | bool = Field(
        default=True,
        description="where scores are kept between runs, under a key of the content of weights, "
        "data and schemes. `true`: `~/.cache/autoround_modifier/autoscheme`; `false`: nowhere",
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="fixes every random choice")

    _expressions = field_validator("targets", "ignore")(checked_expressions)
