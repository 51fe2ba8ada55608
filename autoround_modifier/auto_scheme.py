"""`AutoSchemeModifier`: chooses each layer's scheme under a budget of bits. Lifecycle only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from compressed_tensors.offload import disable_onloading, is_distributed
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.pytorch import infer_sequential_targets
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator
from torch import nn
from tqdm import tqdm

from autoround_modifier.autoscheme import (
    SCORES,
    Choice,
    MeasuredUnit,
    Measurement,
    ScoreCache,
    SensitivityConfig,
    Unit,
    default_cache_folder,
    find_units,
    measure_sensitivity,
    resolve_options,
    saved_bits,
)
from autoround_modifier.errors import (
    CalibrationError,
    OutputExistsError,
    RecipeError,
    SchemeError,
)
from autoround_modifier.files import write_atomically
from autoround_modifier.modifier import AutoRoundModifier
from autoround_modifier.presets import PRESET_FIELDS, PRESETS
from autoround_modifier.validation import (
    Layer,
    check_calibration_data,
    check_layers,
    listed,
    resolve_schemes,
    untargeted_routers,
)

__all__ = ["AutoSchemeModifier"]

MEASUREMENT_FILE = "auto_scheme.json"
RECIPE_FILE = "recipe.yaml"
PLOT_FILE = "auto_scheme.png"


class AutoSchemeModifier(Modifier):
    """
    Measures how much each layer loses under each of several schemes, and gives every layer one of
    them, so that the model fits a budget of bits with the least loss (AutoScheme of SignRoundV2,
    https://arxiv.org/abs/2512.04746, section 3.1). The `AutoRoundModifier` behind it takes over
    the choice:

    ```yaml
    quant_stage:
      quant_modifiers:
        AutoSchemeModifier: {avg_bits: 2.5, options: [W2A16G64, W4A16G64, W8A16G64]}
        AutoRoundModifier: {preset: default}
    ```

    Layers that engines fuse (q/k/v, gate/up, the experts of a block), layers with one weight, and
    what ``shared_layers`` names get one scheme together. Bits are those of the checkpoint: packed
    values, scales, zero points. The model is measured as it is when the recipe starts, on the
    device it is on, before other modifiers (SmoothQuant, AWQ) change it.

    Lifecycle:

    - on_initialize: refuse bad input, measure, choose, hand the choice on

    If the `AutoRoundModifier` has schemes already, as in the recipe saved with a model, nothing is
    measured or chosen.

    :param avg_bits: largest mean of bits for each weight of the layers
    :param options: schemes to choose from: presets of compressed-tensors such as ``MXFP4``, for
        integer weights also with zero points and a group size (``W2A16G64``, ``W4A16_ASYM_G32``),
        or fields of `QuantizationScheme` with a ``name``; ``UNQUANTIZED`` leaves a layer alone
    :param targets: layers to choose for, as in `AutoRoundModifier`
    :param ignore: layers to leave out, with those that the `AutoRoundModifier` ignores
    :param shared_layers: further groups of layers that get one scheme, each a list of targets
    :param whole_model: let ``avg_bits`` be a mean over all parameters of the model, embeddings and
        norms included
    :param score: ``fisher``, the divergence to second order, or ``delta_loss``, SignRoundV2's first
        order of the loss on the text
    :param scale_search: measure with searched scales, not with those of minimum and maximum
    :param num_calibration_samples: calibration samples to measure on
    :param batch_size: of them in each pass of a block
    :param output_dir: where to write the scores (``auto_scheme.json``), the recipe without search
        (``recipe.yaml``) and, where matplotlib is installed, a picture (``auto_scheme.png``)
    :param cache_dir: where scores are kept between runs, under a key of the content of weights,
        data and schemes; defaults to ``~/.cache/autoround_modifier/autoscheme``, false for nowhere
    :param seed: fixes every random choice
    """

    avg_bits: float = Field(gt=0)
    options: list[str | dict[str, Any]]
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    shared_layers: list[list[str]] = Field(default_factory=list)
    whole_model: bool = False
    score: str = "fisher"
    scale_search: bool = True
    num_calibration_samples: int = Field(default=32, ge=1)
    batch_size: int = Field(default=8, ge=1)
    output_dir: str | None = None
    cache_dir: str | bool = True
    seed: int = 42

    _choice: Choice | None = PrivateAttr(default=None)

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: str) -> str:
        if value not in SCORES:
            raise ValueError(f"unknown score `{value}`; use one of {', '.join(SCORES)}")
        return value

    @field_validator("options")
    @classmethod
    def _known_options(cls, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        resolve_options(value)
        return value

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        # The host writes this dict into recipe.yaml; plain data keeps the file loadable.
        return super().model_dump(**{"mode": "json", **kwargs})

    @property
    def choice(self) -> Choice | None:
        """What was chosen, and from which scores; None before it."""
        return self._choice

    # ------------------------------------------------------------------ lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises RecipeError: if no `AutoRoundModifier` follows, or no module is targeted
        :raises SchemeError: if an option does not fit a layer, or no choice fits the budget
        :raises CalibrationError: if there is no calibration data, or it does not reach a layer
        :raises NonFiniteError: if a weight or an output has NaN or infinity
        :raises OutputExistsError: if ``output_dir`` holds results
        :raises RuntimeError: if several processes share the work
        """
        modifiers = active_session().lifecycle.recipe.modifiers
        tuner = _following_tuner(self, modifiers)
        if tuner.has_schemes:
            logger.warning(
                "AutoRoundModifier has schemes already: AutoSchemeModifier chooses nothing. Remove "
                "`scheme` and `config_groups` from AutoRoundModifier to choose again."
            )
            return True
        if is_distributed():
            raise RuntimeError(
                "AutoSchemeModifier does not run in several processes. Choose in one, and tune "
                f"with the {RECIPE_FILE} that it writes to `output_dir`."
            )
        self._check_output()
        check_calibration_data(state.data.calib, "AutoSchemeModifier")
        model, schemes = state.model, resolve_options(self.options)
        ignore = list(dict.fromkeys([*self.ignore, *tuner.ignore]))
        layers = self._layers(model, schemes, ignore)
        units = find_units(model, layers, self.shared_layers)
        # All but the scores is known: the budget is checked before anything runs.
        empty = _measurement(model, layers, units, schemes, {}, self.score)
        empty.choose(self.avg_bits, self.whole_model)
        original = any(scheme.weights is None for scheme in schemes.values())
        if original and self.avg_bits >= empty.range(self.whole_model)[1]:
            raise SchemeError(
                f"avg_bits is {self.avg_bits}: the model fits without quantization; lower it, or "
                "leave UNQUANTIZED out of `options`"
            )

        targets = infer_sequential_targets(model, kwargs.get("sequential_targets"))
        blocks = {block: name for name, block in match_named_modules(model, targets)}
        batches = cast(Iterable[dict[str, Any]], state.data.calib)
        # Once: a loader that shuffles would bring others the next time.
        samples = list(_first_samples(batches, self.num_calibration_samples))
        scores = self._scores(model, blocks, layers, schemes, samples)
        measured = _measurement(model, layers, units, schemes, scores, self.score)
        self._choice = choice = measured.choose(self.avg_bits, self.whole_model)
        logger.info(f"Chosen schemes:\n{choice.table()}")
        logger.info(
            f"{choice.avg_bits():.4f} bits per weight of these layers, "
            f"{choice.avg_bits(whole_model=True):.4f} per parameter of the model, "
            f"{choice.model_bytes / 1e6:.1f} MB in all"
        )
        tuner.assign_schemes(choice.config_groups(), ignore)
        self._write_results(choice, tuner, [other for other in modifiers if other is not self])
        return True

    # ------------------------------------------------------------------ measurement

    def _layers(
        self, model: nn.Module, options: dict[str, QuantizationScheme], ignore: list[str]
    ) -> dict[str, Layer]:
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        layers: dict[str, Layer] = {}
        for option, scheme in options.items():
            groups = {"group_0": scheme.model_copy(update={"targets": targets})}
            config = QuantizationConfig(config_groups=groups, ignore=ignore)
            config.ignore = [*ignore, *untargeted_routers(model, config)]
            resolved = resolve_schemes(model, config)
            layers = {name: layer for name, (layer, _) in resolved.items()}
            if scheme.weights is None:
                continue
            try:
                check_layers(resolved)
            except SchemeError as error:
                raise SchemeError(f"option {option}: {error}") from error
        quantized = [name for name, layer in layers.items() if is_module_quantized(layer)]
        if quantized:
            raise RecipeError(
                f"AutoSchemeModifier: these layers have a scheme already: {listed(quantized)}. Add "
                "them to `ignore`, or put AutoSchemeModifier before the modifier that gave it."
            )
        return layers

    def _scores(
        self,
        model: nn.Module,
        blocks: dict[nn.Module, str],
        layers: dict[str, Layer],
        options: dict[str, QuantizationScheme],
        batches: list[dict[str, Any]],
    ) -> dict[str, dict[str, float]]:
        """:return: scheme -> layer -> score; layers that no gradient reached are not in it"""
        config = SensitivityConfig(
            score=self.score,
            scale_search=self.scale_search,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        cache = self._cache(model, blocks, layers, batches)
        scores: dict[str, dict[str, float]] = {}
        if cache is not None:
            found = {name: cache.find(scheme) for name, scheme in options.items()}
            scores = {name: known for name, known in found.items() if known is not None}
            if scores:
                logger.info(f"Scores measured before: {', '.join(scores)}")
        missing = {name: scheme for name, scheme in options.items() if name not in scores}
        if missing:
            names = {layer: name for name, layer in layers.items()}
            with tqdm(total=len(blocks), desc="Sensitivity", unit="block") as progress:

                def advance() -> None:
                    progress.update()

                measured = measure_sensitivity(
                    model, blocks, names, missing, batches, config, advance
                )
            for option, scheme in missing.items():
                scores[option] = {layer: by_option[option] for layer, by_option in measured.items()}
                if cache is not None:
                    cache.keep(scheme, scores[option])
        return scores

    def _cache(
        self,
        model: nn.Module,
        blocks: dict[nn.Module, str],
        layers: dict[str, Layer],
        batches: list[dict[str, Any]],
    ) -> ScoreCache | None:
        if self.cache_dir is False:
            return None
        folder = default_cache_folder() if self.cache_dir is True else Path(self.cache_dir)
        settings = {
            "blocks": list(blocks.values()),
            "layers": list(layers),
            "score": self.score,
            "scale_search": self.scale_search,
            "num_calibration_samples": self.num_calibration_samples,
            "seed": self.seed,
        }
        return ScoreCache(folder, model, batches, settings)

    # ------------------------------------------------------------------ results

    def _check_output(self) -> None:
        if self.output_dir is None:
            return
        folder = Path(self.output_dir)
        there = [
            name for name in (MEASUREMENT_FILE, RECIPE_FILE, PLOT_FILE) if (folder / name).exists()
        ]
        if there:
            raise OutputExistsError(
                f"{folder} holds {', '.join(there)} already; choose another `output_dir`"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to; choose another `output_dir`")

    def _write_results(
        self, choice: Choice, tuner: AutoRoundModifier, others: list[Modifier]
    ) -> None:
        if self.output_dir is None:
            return
        folder = Path(self.output_dir)
        choice.measurement.save(folder / MEASUREMENT_FILE)
        write_atomically(folder / RECIPE_FILE, explicit_recipe(choice, tuner, others))
        try:
            from autoround_modifier.autoscheme.plot import plot_choice

            plot_choice(choice, folder / PLOT_FILE)
        except ImportError:
            logger.info("no picture: `pip install autoround-modifier[plot]` brings matplotlib")
        except Exception as error:  # a picture is not worth the run
            logger.warning(f"no picture: {error}")


def explicit_recipe(choice: Choice, tuner: AutoRoundModifier, modifiers: list[Modifier]) -> str:
    """
    :param tuner: the modifier that took over the choice
    :param modifiers: of the recipe, without the AutoSchemeModifier
    :return: a recipe that gives the same schemes without a search, YAML
    """
    groups: dict[str, dict[str, Any]] = {}
    group = "quant_modifiers"
    for modifier in modifiers:
        name = type(modifier).__name__
        if name in groups.get(group, {}):  # a second one in a group would replace the first
            group = f"quant_{len(groups)}_modifiers"
        fields = modifier.model_dump(exclude_unset=True)
        for unwanted in ("group", "requires_calibration_data"):
            fields.pop(unwanted, None)
        if modifier is tuner:
            preset = PRESETS[tuner.preset]
            for field in PRESET_FIELDS:  # what the preset stands for anyway
                if fields.get(field) == getattr(preset, field):
                    del fields[field]
            fields["config_groups"] = choice.config_groups()
        fields = {k: v for k, v in fields.items() if v is not None and not k.endswith("_")}
        groups.setdefault(group, {})[name] = fields
    head = (
        f"# {choice.avg_bits():.4f} bits per weight, chosen from "
        f"{', '.join(choice.measurement.schemes)} by AutoSchemeModifier.\n"
    )
    return head + yaml.safe_dump({"quant_stage": groups}, sort_keys=False, width=100)


def _following_tuner(
    scheme_modifier: AutoSchemeModifier, modifiers: list[Modifier]
) -> AutoRoundModifier:
    """:raises RecipeError: if there is none"""
    position = next(i for i, modifier in enumerate(modifiers) if modifier is scheme_modifier)
    following = [x for x in modifiers[position + 1 :] if isinstance(x, AutoRoundModifier)]
    if not following:
        raise RecipeError(
            "AutoSchemeModifier chooses for the AutoRoundModifier that follows it, and none does; "
            "add one"
        )
    return next((tuner for tuner in following if not tuner.has_schemes), following[0])


def _first_samples(batches: Iterable[dict[str, Any]], num_samples: int) -> Iterator[dict[str, Any]]:
    """Yield batches until there are ``num_samples`` rows."""
    for batch in batches:
        if num_samples <= 0:
            return
        num_samples -= len(batch["input_ids"])
        yield batch


def _measurement(
    model: nn.Module,
    layers: dict[str, Layer],
    units: list[Unit],
    options: dict[str, QuantizationScheme],
    scores: dict[str, dict[str, float]],
    score: str,
) -> Measurement:
    """
    :param scores: scheme -> layer -> score; empty for none yet
    :raises CalibrationError: if no layer of a unit has a score
    """
    measured, unreached, partly = [], [], []
    with disable_onloading():  # an onloaded parameter is another object each time
        sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        chosen = set(layers.values())
        # By module: an embedding whose weight a chosen layer shares is saved by itself as well.
        others = {
            id(parameter): parameter
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if name != "weight" or module not in chosen
        }.values()
        other_weights = sum(p.numel() for p in others)
        other_bits = sum(p.numel() * p.itemsize * 8 for p in others)
    for unit in units:
        reached = [name for name in unit.layers if all(name in x for x in scores.values())]
        if not reached:
            unreached.append(unit.name)
        elif len(reached) < len(unit.layers):
            partly += [name for name in unit.layers if name not in reached]
        measured.append(
            MeasuredUnit(
                name=unit.name,
                layers=unit.layers,
                targets=unit.targets,
                num_weights=sum(sizes[name] for name in unit.layers),
                bits={
                    option: sum(saved_bits(layers[name], scheme) for name in unit.layers)
                    for option, scheme in options.items()
                },
                scores={
                    option: sum(scores[option][name] for name in reached) if scores else 0.0
                    for option in options
                },
            )
        )
    if unreached:
        raise CalibrationError(
            "no gradient of the model's output reaches these layers, so their schemes cannot be "
            f"chosen: {listed(unreached)}. Calibrate on data that does, or add them to `ignore`."
        )
    if partly:
        logger.warning(
            f"{len(partly)} layers saw no calibration token and count as if they lost nothing; "
            f"they share the scheme of those that did: {listed(partly)}"
        )
    return Measurement(score, options, measured, other_weights, other_bits)
