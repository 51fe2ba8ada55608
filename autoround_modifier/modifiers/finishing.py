"""What is put right in a checkpoint once LLM-Compressor has saved it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedConfig, PreTrainedModel

from autoround_modifier.checkpoints.check import check_saved
from autoround_modifier.checkpoints.saved_config import changed_fields, with_changes
from autoround_modifier.checkpoints.saved_files import CONFIG, read_json, write_json
from autoround_modifier.checkpoints.source import cached_config
from autoround_modifier.fields import AutoSchemeFields
from autoround_modifier.host.lifecycle import Modifier, recipe_modifiers, recipe_stage
from autoround_modifier.host.loading import save_without_requantizing
from autoround_modifier.host.prediction import quantization_section
from autoround_modifier.host.saving import (
    RECIPE,
    check_generation_config,
    finish_when_saved,
    recipe_text,
)
from autoround_modifier.modifiers.gguf_blocks import TunedBlocks
from autoround_modifier.modifiers.mtp import MtpLayers, find_mtp_layers, save_mtp_layers
from autoround_modifier.modifiers.settings import SchemeSettings
from autoround_modifier.report.recorder import OriginalModel, RunRecorder, active_recorder
from autoround_modifier.report.schema import REPORT_FILE

__all__ = ["FINISHING_STEPS", "SavePlan", "SavedModel", "finish_checkpoint", "prepare_saving"]


@dataclass(frozen=True)
class SavePlan:
    """
    What is known before the run.

    :ivar origin: folder or name that the model was loaded from; may be empty
    :ivar source_config: what its ``config.json`` means to the class of the model's config; None if
        it is not on this machine, or belongs to another class
    :ivar mtp: layers that Transformers does not load
    :ivar modifiers: all of the recipe
    :ivar stage: their stage in it
    :ivar engine: which must load it
    :ivar original: what the model was
    :ivar recorder: of the run; None where nobody records it
    :ivar blocks: takes the layers that are tuned in types of GGUF
    """

    origin: str
    source_config: dict[str, Any] | None
    mtp: MtpLayers
    modifiers: Sequence[Modifier]
    stage: str
    engine: str
    original: OriginalModel
    recorder: RunRecorder | None
    blocks: TunedBlocks = field(default_factory=TunedBlocks)


@dataclass(frozen=True)
class SavedModel:
    """
    :ivar model: as it is after saving: compressed
    :ivar folder: with all that LLM-Compressor wrote; not yet where the user wants it
    :ivar plan: of what is put right
    """

    model: PreTrainedModel
    folder: Path
    plan: SavePlan


def write_own_config(saved: SavedModel) -> None:
    """
    LLM-Compressor writes the source's ``config.json``. Where the model differs from the source,
    such as in its vocabulary or number of layers, what the model has is written.
    """
    source, own = saved.plan.source_config, saved.model.config
    if source is None:
        return
    changes = changed_fields(source, own.to_dict())
    config = with_changes(read_json(saved.folder / CONFIG), changes, own.attribute_map)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method != "compressed-tensors":  # of a source that was dequantized
        config.pop("quantization_config", None)
    write_json(saved.folder / CONFIG, config)


def write_names(saved: SavedModel) -> None:
    """
    Layers are named in ``quantization_config`` so that every engine finds the same ones. Where that
    fails, the names that LLM-Compressor wrote stay, with an error in the log.
    """
    config = read_json(saved.folder / CONFIG)
    try:
        section = quantization_section(saved.model)
    except Exception as error:  # the run is over, and its files are worth more than their names
        logger.error(f"layers are named in config.json as LLM-Compressor does: {error!r}")
        return
    if section is None:
        return
    written = config.get("quantization_config") or {}
    config["quantization_config"] = {**written, **section}
    write_json(saved.folder / CONFIG, config)


def write_mtp_layers(saved: SavedModel) -> None:
    """Layers for multi-token prediction are kept, and the config says whether there are any."""
    save_mtp_layers(saved.model, saved.folder, saved.plan.mtp)


def write_gguf_blocks(saved: SavedModel) -> None:
    """Blocks of layers that were tuned in types of GGUF, which compressed-tensors cannot hold."""
    saved.plan.blocks.save(saved.model, saved.folder)


def write_recipe(saved: SavedModel) -> None:
    """``recipe.yaml`` holds every modifier, several of one class as well."""
    text = recipe_text(saved.plan.modifiers, saved.plan.stage, saved.plan.origin)
    (saved.folder / RECIPE).write_text(text, encoding="utf-8")


def write_report(saved: SavedModel) -> None:
    """``quantization_report.json`` says what was done. Without it the checkpoint is as good."""
    plan = saved.plan
    if plan.recorder is None:
        return
    budgets = [x.avg_bits for x in plan.modifiers if isinstance(x, AutoSchemeFields)]
    try:
        report = plan.recorder.report(
            saved.model,
            plan.original,
            (saved.folder / RECIPE).read_text(encoding="utf-8"),
            next(iter(budgets), None),
            saved.folder,
            plan.blocks.types,
        )
    except Exception as error:  # the run is over, and its files are worth more than a report
        logger.error(f"{REPORT_FILE} was not written: {error!r}")
        return
    text = report.model_dump_json(indent=1) + "\n"
    (saved.folder / REPORT_FILE).write_text(text, encoding="utf-8")


# In this order
FINISHING_STEPS: tuple[Callable[[SavedModel], None], ...] = (
    write_own_config,
    write_names,
    write_mtp_layers,
    write_gguf_blocks,
    write_recipe,
    write_report,
)


def finish_checkpoint(model: PreTrainedModel, folder: Path, plan: SavePlan) -> None:
    """
    Put files right, and log what is still wrong with them.

    :param model: that was saved
    :param folder: with all that LLM-Compressor wrote; files are changed and added
    :param plan: `prepare_saving`
    """
    saved = SavedModel(model, folder, plan)
    for step in FINISHING_STEPS:
        step(saved)
    check_saved(model, folder, plan.engine)


def _source_config(own: PreTrainedConfig, stored: dict[str, Any] | None) -> dict[str, Any] | None:
    if stored is None or stored.get("model_type") != own.model_type:
        return None
    try:
        return type(own).from_dict(stored).to_dict()
    except Exception as error:
        logger.warning(
            f"the config.json of {own._name_or_path} cannot be compared with the model, and will "
            f"be saved as it is: {error}"
        )
        return None


def prepare_saving(model: PreTrainedModel) -> SavePlan:
    """
    Called by modifiers before the run: let the model be finished whenever it is saved, now by
    LLM-Compressor or later by the user.

    :param model: with the recipe of the active session
    :return: what will be put right
    :raises SavingError: if it could not be saved
    :raises SchemeError: if layers for multi-token prediction cannot have their scheme
    """
    check_generation_config(model)
    save_without_requantizing(model)
    modifiers, origin = recipe_modifiers(), model.config._name_or_path
    revision = getattr(model.config, "_commit_hash", None)
    plan = SavePlan(
        origin,
        _source_config(model.config, cached_config(origin, revision)),
        find_mtp_layers(model, modifiers),
        modifiers,
        recipe_stage(),
        next((x.engine for x in reversed(modifiers) if isinstance(x, SchemeSettings)), "any"),
        OriginalModel.of(model),
        active_recorder(),
    )
    finish_when_saved(model, partial(finish_checkpoint, plan=plan))
    return plan
