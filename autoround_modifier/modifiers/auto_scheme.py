"""`AutoSchemeModifier`: chooses each layer's scheme under a budget of bits. Lifecycle only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from loguru import logger
from pydantic import PrivateAttr, field_validator

from autoround_modifier.errors import (
    OutputExistsError,
    RecipeError,
)
from autoround_modifier.fields import AutoSchemeFields
from autoround_modifier.host.blocks import find_blocks
from autoround_modifier.host.lifecycle import (
    Modifier,
    PlainDataModifier,
    State,
    recipe_modifiers,
)
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.explicit_recipe import explicit_recipe
from autoround_modifier.modifiers.failures import say_what_is_left
from autoround_modifier.modifiers.validation import (
    check_calibration_data,
    check_one_process,
    layers_to_choose_for,
)
from autoround_modifier.progress.bar import Progress
from autoround_modifier.progress.events import Result, phase, publish
from autoround_modifier.runs.files import write_atomically
from autoround_modifier.schemes.cache import default_cache_folder
from autoround_modifier.schemes.choose import check_budget, choose_for_layers
from autoround_modifier.schemes.measurement import Choice
from autoround_modifier.schemes.options import resolve_options
from autoround_modifier.schemes.scores import SCORES
from autoround_modifier.schemes.sensitivity import SensitivityConfig

__all__ = ["AutoSchemeModifier"]

MEASUREMENT_FILE = "auto_scheme.json"
RECIPE_FILE = "recipe.yaml"
PLOT_FILE = "auto_scheme.png"


class AutoSchemeModifier(AutoSchemeFields, PlainDataModifier):
    """
    Measures how much each layer loses under each of several schemes, and gives every layer one of
    them, so that the model fits a budget of bits with the least loss (AutoScheme of SignRoundV2,
    https://arxiv.org/abs/2512.04746, section 3.1). The `AutoRoundModifier` after it takes over
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
    """

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

    @property
    def choice(self) -> Choice | None:
        """What was chosen, and from which scores; None before it."""
        return self._choice

    # ------------------------------------------------------------------ lifecycle

    @property
    def num_samples_used(self) -> int:
        """How many calibration samples the scores are measured on."""
        return self.num_calibration_samples

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises RecipeError: if no `AutoRoundModifier` follows, or no module is targeted
        :raises SchemeError: if an option does not fit a layer, or no choice fits the budget
        :raises CalibrationError: if there is no calibration data, or it does not reach a layer
        :raises NonFiniteError: if a weight or an output has NaN or infinity
        :raises OutputExistsError: if ``output_dir`` holds results
        :raises RuntimeError: if several processes share the work
        """
        modifiers = recipe_modifiers()
        tuner = _following_tuner(self, modifiers)
        if tuner.has_schemes:
            logger.warning(
                "AutoRoundModifier has schemes already: AutoSchemeModifier chooses nothing. Remove "
                "`scheme` and `config_groups` from AutoRoundModifier to choose again."
            )
            return True
        check_one_process(f"AutoSchemeModifier (but the {RECIPE_FILE} in its `output_dir`)")
        self._check_output()
        check_calibration_data(state.data.calib, "AutoSchemeModifier", state.model)
        model, schemes = state.model, resolve_options(self.options)
        ignore = list(dict.fromkeys([*self.ignore, *tuner.ignore]))
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        layers = layers_to_choose_for(model, schemes, targets, ignore)
        # All but the scores is known: the budget is checked before anything runs.
        engine = tuner.engine if self.engine is None else self.engine
        check_budget(
            model, layers, schemes, self.avg_bits, self.whole_model, self.shared_layers, engine
        )
        blocks = find_blocks(model, kwargs.get("sequential_targets"))
        batches = cast(Iterable[dict[str, Any]], state.data.calib)
        # Read once: a loader that shuffles would give other samples the next time.
        samples = list(_first_samples(batches, self.num_calibration_samples))
        progress = Progress("choosing", len(blocks), len(blocks), title="Sensitivity", unit="block")
        with (
            phase("choosing"),
            contextlib.closing(progress),
            say_what_is_left(
                "AutoSchemeModifier stopped. The model in memory is as it was. Scores are kept "
                "when all are measured; those of earlier runs stay."
            ),
        ):
            self._choice = choice = choose_for_layers(
                model,
                blocks,
                layers,
                schemes,
                samples,
                self.avg_bits,
                self._config(),
                self.whole_model,
                self.shared_layers,
                self._cache_folder(),
                progress.advance,
                engine,
            )
        publish(Result("choosing", choice))
        logger.info(f"Chosen schemes:\n{choice.table()}")
        logger.info(
            f"{choice.avg_bits():.4f} bits per weight of these layers, "
            f"{choice.avg_bits(whole_model=True):.4f} per parameter of the model, "
            f"{choice.model_bytes / 1e6:.1f} MB in all"
        )
        tuner.assign_schemes(choice.config_groups(), ignore)
        tuner.engine = engine
        self._write_results(choice, tuner, [other for other in modifiers if other is not self])
        return True

    def _config(self) -> SensitivityConfig:
        return SensitivityConfig(
            score=self.score,
            scale_search=self.scale_search,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def _cache_folder(self) -> Path | None:
        if self.cache_dir is False:
            return None
        return default_cache_folder() if self.cache_dir is True else Path(self.cache_dir)

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
            from autoround_modifier.schemes.plot import plot_choice

            plot_choice(choice, folder / PLOT_FILE)
        except ImportError:
            logger.info(
                "no picture: matplotlib is not installed (`pip install autoround-modifier[plot]`)"
            )
        except Exception as error:  # a picture is not worth the run
            logger.warning(f"no picture: {error}")


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
