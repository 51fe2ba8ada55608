"""What a recipe asks for, as far as it decides what a run takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround_modifier.defaults import MAX_SEQ_LENGTH, NUM_CALIBRATION_SAMPLES
from autoround_modifier.errors import RecipeError
from autoround_modifier.host.lifecycle import Modifier, Recipe, as_recipe
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.auto_scheme import AutoSchemeModifier
from autoround_modifier.modifiers.scale_distillation import ScaleDistillationModifier
from autoround_modifier.recipe_composition import compose_recipe
from autoround_modifier.recipes import load_recipe

__all__ = ["RecipeParts", "RunSettings", "read_recipe", "scheme_recipe"]


@dataclass(frozen=True)
class RunSettings:
    """
    Fields of the recipe and of `oneshot` that decide what a run takes.

    :ivar samples: calibration samples that are run; 0 where no data is needed
    :ivar length: tokens of each
    :ivar offload_device: where samples are kept while blocks are tuned, see `AutoRoundModifier`
    :ivar model_on_disk: weights stay on the disk and are loaded block by block
    :ivar checkpoint_dir: finished blocks are kept
    :ivar distillation_batch: samples in one pass of scale distillation; 0 without it
    :ivar distillation_samples: that it records
    :ivar distillation_positions: share of their positions that it records
    :ivar distillation_holdout: share of its samples on which it is judged
    :ivar choosing_samples: on which `AutoSchemeModifier` measures; 0 without it
    """

    iters: int
    scale_search: bool
    loss: str
    batch_size: int
    gradient_accumulate_steps: int
    samples: int
    length: int
    holdout_fraction: float
    holdout_evaluations: int
    offload_device: str = "auto"
    model_on_disk: bool = False
    checkpoint_dir: bool = False
    distillation_iters: int = 0
    distillation_batch: int = 0
    distillation_samples: int = 0
    distillation_positions: float = 1.0
    distillation_checkpointing: bool = True
    distillation_holdout: float = 0.0
    choosing_samples: int = 0


@dataclass(frozen=True)
class RecipeParts:
    """
    :ivar name: of the recipe, for messages
    :ivar tuners: the `AutoRoundModifier`s, in their order
    :ivar chooser: the `AutoSchemeModifier`, if its choice is still open
    :ivar distiller: if there is one
    :ivar others: names of modifiers that are not estimated
    """

    name: str
    tuners: tuple[AutoRoundModifier, ...]
    chooser: AutoSchemeModifier | None
    distiller: ScaleDistillationModifier | None
    others: tuple[str, ...]

    def settings(
        self, max_seq_length: int | None, model_length: int | None, model_on_disk: bool
    ) -> RunSettings:
        """
        :param max_seq_length: of `oneshot`; None for its default
        :param model_length: largest number of tokens that the model takes, if it says so
        :param model_on_disk: see `RunSettings`
        """
        tuner = max(self.tuners, key=lambda x: (x.iters or 0, bool(x.scale_search)))
        samples = int(tuner.num_calibration_samples or 0)
        needs_data = any(x.requires_calibration_data for x in self.tuners)
        if needs_data and not samples:
            samples = NUM_CALIBRATION_SAMPLES  # static scales alone
        length = max_seq_length or min(MAX_SEQ_LENGTH, model_length or MAX_SEQ_LENGTH)
        distiller = self.distiller
        return RunSettings(
            iters=int(tuner.iters or 0),
            scale_search=bool(tuner.scale_search),
            loss=str(tuner.loss),
            batch_size=tuner.batch_size,
            gradient_accumulate_steps=tuner.gradient_accumulate_steps,
            samples=samples if needs_data or distiller or self.chooser else 0,
            length=length,
            holdout_fraction=tuner.holdout_fraction,
            holdout_evaluations=tuner.holdout_evaluations,
            offload_device=tuner.offload_device,
            model_on_disk=model_on_disk,
            checkpoint_dir=tuner.checkpoint_dir is not None,
            distillation_iters=distiller.iters if distiller else 0,
            distillation_batch=distiller.batch_size if distiller else 0,
            distillation_samples=distiller.num_batches_used if distiller else 0,
            distillation_positions=distiller.position_fraction if distiller else 1.0,
            distillation_checkpointing=distiller.gradient_checkpointing if distiller else True,
            distillation_holdout=distiller.holdout_fraction if distiller else 0.0,
            choosing_samples=self.chooser.num_calibration_samples if self.chooser else 0,
        )


def scheme_recipe(scheme: str, **fields: Any) -> Recipe:
    """
    :param scheme: as in `schemes.named_scheme`: ``W4A16``, ``FP8_BLOCK``, ``W2A16G64``
    :param fields: of `AutoRoundModifier`
    :return: as `quantize --scheme` makes it
    :raises RecipeError: if the fields are not sound
    :raises SchemeError: if there is no such scheme
    """
    return as_recipe(compose_recipe(auto_round={"scheme": scheme, **fields}))


def read_recipe(recipe: Any, fields: Mapping[str, Any]) -> RecipeParts:
    """
    :param recipe: path, name of a shipped recipe, modifier, list of modifiers or `Recipe`
    :param fields: of `AutoRoundModifier`, which replace those of the recipe
    :raises RecipeError: if it is not sound, or has no `AutoRoundModifier`
    """
    name = recipe if isinstance(recipe, (str, Path)) else type(recipe).__name__
    if isinstance(recipe, (str, Path)):
        modifiers: Iterable[Modifier] = load_recipe(recipe, **fields).modifiers
    else:
        given = [recipe] if isinstance(recipe, Modifier) else recipe
        given = given if isinstance(given, (list, tuple)) else as_recipe(given).modifiers
        modifiers = [_replaced(x, fields) for x in given]
    modifiers = list(modifiers)
    tuners = tuple(x for x in modifiers if isinstance(x, AutoRoundModifier))
    if not tuners:
        raise RecipeError(f"{name}: has no AutoRoundModifier, and nothing else is estimated")
    chooser = next((x for x in modifiers if isinstance(x, AutoSchemeModifier)), None)
    if chooser is None or all(x.has_schemes for x in tuners):
        chooser = None
    if chooser is None and not all(x.has_schemes for x in tuners):
        raise RecipeError(f"{name}: AutoRoundModifier has neither `scheme` nor `config_groups`")
    own = (AutoRoundModifier, AutoSchemeModifier, ScaleDistillationModifier)
    return RecipeParts(
        str(name),
        tuners,
        chooser,
        next((x for x in modifiers if isinstance(x, ScaleDistillationModifier)), None),
        tuple(type(x).__name__ for x in modifiers if not isinstance(x, own)),
    )


def _replaced(modifier: Modifier, fields: Mapping[str, Any]) -> Modifier:
    if not fields or not isinstance(modifier, AutoRoundModifier):
        return modifier
    given = {name: getattr(modifier, name) for name in modifier.model_fields_set}
    return AutoRoundModifier(**{**given, **fields})
