"""The file that a release is made from: YAML, checked against these models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autoround_modifier import defaults
from autoround_modifier.errors import RecipeError
from autoround_modifier.presets import PRESETS
from autoround_modifier.report.schema import TaskEngine

__all__ = [
    "CheckpointEntry",
    "Demands",
    "EvaluationEntry",
    "Publication",
    "ReleaseFile",
    "read_release",
]

# What a trial takes: every step is the same, on next to nothing
TINY_FIELDS = {"iters": 2, "num_calibration_samples": 4, "batch_size": 2}
TINY_LENGTH = 64
TINY_SAMPLES = 2
TINY_LIMIT = 8


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointEntry(Entry):
    """One checkpoint: a recipe or a scheme, as in `quantize`."""

    name: str = Field(description="of its folder, and of its repository", pattern=r"^[\w.-]+$")
    recipe: str | None = Field(default=None, description="shipped recipe, or file")
    scheme: str | None = Field(default=None, description="such as `W4A16`, in place of a recipe")
    fields: dict[str, Any] = Field(default={}, description="of `AutoRoundModifier`")
    auto_scheme: dict[str, Any] = Field(default={}, description="of `AutoSchemeModifier`")
    distillation: dict[str, Any] | None = Field(
        default=None, description="of `ScaleDistillationModifier`"
    )
    settings: list[str] = Field(default=[], description="`Modifier.field=value`, as `--set`")

    @model_validator(mode="after")
    def _one_way_to_quantize(self) -> CheckpointEntry:
        if sum(map(bool, (self.recipe, self.scheme, self.auto_scheme))) != 1:
            raise ValueError("give one of `recipe`, `scheme` and `auto_scheme`")
        return self


class DataEntry(Entry):
    dataset: str | None = Field(
        default=None, description="as in `quantize`; text that the model writes unless given"
    )
    max_seq_length: int | None = Field(default=None, ge=2)


class EvaluationEntry(Entry):
    """What `evaluate` is asked for."""

    text: Path | None = Field(default=None, description="that calibration does not see")
    match: dict[str, str] = Field(default={}, description="columns and values of rows of the text")
    samples: int = Field(default=defaults.EVALUATION_SAMPLES, ge=1)
    length: int = Field(default=defaults.EVALUATION_LENGTH, ge=2)
    prompts: Path | None = None
    tasks: list[str] = Field(default=[], description="of lm-evaluation-harness")
    task_path: Path | None = Field(default=None, description="folder of further tasks")
    engine: TaskEngine = "transformers"
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    batch_size: str = "auto"
    model_args: dict[str, str | int | float | bool] = {}


class Demands(Entry):
    """What a checkpoint must reach to be published. Without demands, every one is."""

    min_recovery: float | None = Field(
        default=None, gt=0, description="mean over the tasks of result / result of the original"
    )
    max_kl: float | None = Field(default=None, gt=0)
    min_top1: float | None = Field(default=None, gt=0, le=1)


class Publication(Entry):
    owner: str = Field(description="of the repositories, which are named as the checkpoints")
    platform: str = "huggingface"
    private: bool = False


class ReleaseFile(Entry):
    """A release. Paths are relative to the folder of the file."""

    model: str = Field(description="name on the hub, or folder")
    revision: str | None = None
    platform: str | None = Field(default=None, description="hub that the model is on")
    output: Path = Field(description="folder; each checkpoint gets one inside of it")
    checkpoints: list[CheckpointEntry] = Field(min_length=1)
    data: DataEntry = DataEntry()
    evaluation: EvaluationEntry = EvaluationEntry()
    keep: Demands = Demands()
    publish: Publication | None = None
    license: str | None = Field(default=None, description="as the hub spells it, for the card")
    language: list[str] = []
    trust_remote_code: bool = False

    @field_validator("checkpoints")
    @classmethod
    def _names_differ(cls, value: list[CheckpointEntry]) -> list[CheckpointEntry]:
        names = [entry.name for entry in value]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two checkpoints are named {', '.join(sorted(twice))}")
        return value

    @model_validator(mode="after")
    def _demands_can_be_judged(self) -> ReleaseFile:
        if self.keep.min_recovery is not None and not self.evaluation.tasks:
            raise ValueError("`keep.min_recovery` needs `evaluation.tasks`")
        return self

    def tiny(self) -> ReleaseFile:
        """
        :return: the same steps for a trial: few iterations, samples and documents of the tasks, no
            demands, nothing published, in a folder of its own
        """

        def small(entry: CheckpointEntry) -> CheckpointEntry:
            fields = {**entry.fields, **TINY_FIELDS}
            preset = PRESETS.get(fields.pop("preset", "default"))
            if preset is not None and not preset.iters:
                fields["iters"] = 0
                fields["scale_search"] = preset.scale_search
            return entry.model_copy(update={"fields": fields})

        few = {
            "samples": TINY_SAMPLES,
            "length": TINY_LENGTH,
            "limit": TINY_LIMIT,
        }
        return self.model_copy(
            update={
                "output": self.output.with_name(f"{self.output.name}-tiny"),
                "checkpoints": [small(entry) for entry in self.checkpoints],
                "data": self.data.model_copy(update={"max_seq_length": TINY_LENGTH}),
                "evaluation": self.evaluation.model_copy(update=few),
                "keep": Demands(),
                "publish": None,
            }
        )


def read_release(path: Path) -> ReleaseFile:
    """
    :param path: of the file
    :return: with paths that no longer depend on where the file is
    :raises RecipeError: if it is not sound; says where
    :raises OSError: if it cannot be read
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        release = ReleaseFile.model_validate(content)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()
        ]
        raise RecipeError(f"{path}: {'; '.join(problems)}") from error
    folder = path.resolve().parent
    evaluation = {
        name: folder / value
        for name in ("text", "prompts", "task_path")
        if (value := getattr(release.evaluation, name)) is not None
    }
    dataset, entries = release.data.dataset, release.checkpoints
    return release.model_copy(
        update={
            "model": _from(folder, release.model),
            "output": folder / release.output,
            "data": release.data.model_copy(
                update={"dataset": None if dataset is None else _from(folder, dataset)}
            ),
            "checkpoints": [
                entry.model_copy(update={"recipe": entry.recipe and _from(folder, entry.recipe)})
                for entry in entries
            ],
            "evaluation": release.evaluation.model_copy(update=evaluation),
        }
    )


def _from(folder: Path, name: str) -> str:
    """:return: a path, if there is such a file or folder; else the name, which a hub may know"""
    path = folder / Path(name).expanduser()
    return str(path) if path.exists() else name
