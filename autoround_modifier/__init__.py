"""
SignRound (AutoRound) as a native modifier of LLM-Compressor.

Importing this package registers `AutoRoundModifier`, `AutoSchemeModifier` and
`ScaleDistillationModifier` with LLM-Compressor, the first in place of the built-in modifier of that
name.

What is listed in ``__all__`` is public. Everything else may change without notice.
"""

from autoround_modifier.command import runs_as_command
from autoround_modifier.version import __version__

if not runs_as_command():  # which does not wait for PyTorch before it answers `--help`
    from autoround_modifier.api import (
        choose_schemes,
        distill,
        evaluate,
        quantize,
        quantized_weights,
    )
    from autoround_modifier.calibration import self_generated, text_dataset
    from autoround_modifier.checkpoints.check import check_checkpoint
    from autoround_modifier.distillation import DistillationResult
    from autoround_modifier.engines.problem import Problem
    from autoround_modifier.entrypoint import oneshot
    from autoround_modifier.errors import (
        BackendError,
        CalibrationError,
        CheckpointError,
        CompressedSourceError,
        EvaluationError,
        ExportError,
        FailedError,
        HubError,
        MissingExtraError,
        NonFiniteError,
        OutputExistsError,
        RecipeError,
        SavingError,
        SchemeError,
    )
    from autoround_modifier.evaluation import Divergence
    from autoround_modifier.exports.exporting import Exported, export
    from autoround_modifier.formats import QuantizedWeight
    from autoround_modifier.host.loading import load_model
    from autoround_modifier.inference.loading import load
    from autoround_modifier.inspection.checkpoint import CheckpointInspection, inspect_checkpoint
    from autoround_modifier.modifiers.auto_round import AutoRoundModifier
    from autoround_modifier.modifiers.auto_scheme import AutoSchemeModifier
    from autoround_modifier.modifiers.scale_distillation import ScaleDistillationModifier
    from autoround_modifier.planning import Plan, plan
    from autoround_modifier.presets import PRESETS, Preset
    from autoround_modifier.progress.block_report import BlockReport
    from autoround_modifier.recipe_files import find_recipe, list_recipes
    from autoround_modifier.recipes import load_recipe
    from autoround_modifier.schemes import Choice, Measurement

__all__ = [
    "PRESETS",
    "AutoRoundModifier",
    "AutoSchemeModifier",
    "BackendError",
    "BlockReport",
    "CalibrationError",
    "CheckpointError",
    "CheckpointInspection",
    "Choice",
    "CompressedSourceError",
    "DistillationResult",
    "Divergence",
    "EvaluationError",
    "ExportError",
    "Exported",
    "FailedError",
    "HubError",
    "Measurement",
    "MissingExtraError",
    "NonFiniteError",
    "OutputExistsError",
    "Plan",
    "Preset",
    "Problem",
    "QuantizedWeight",
    "RecipeError",
    "SavingError",
    "ScaleDistillationModifier",
    "SchemeError",
    "__version__",
    "check_checkpoint",
    "choose_schemes",
    "distill",
    "evaluate",
    "export",
    "find_recipe",
    "inspect_checkpoint",
    "list_recipes",
    "load",
    "load_model",
    "load_recipe",
    "oneshot",
    "plan",
    "quantize",
    "quantized_weights",
    "self_generated",
    "text_dataset",
]
