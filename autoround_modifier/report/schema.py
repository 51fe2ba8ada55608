"""
``quantization_report.json`` and ``evaluation.json``, the files beside a checkpoint from which its
page and its model card are made.

Fields may be added within a version; where one changes its meaning, the version is raised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from autoround_modifier.errors import CheckpointError, described_problems

__all__ = [
    "EVALUATION_FILE",
    "REPORT_FILE",
    "AutoSchemeRecord",
    "BlockRecord",
    "DataRecord",
    "DistillationRecord",
    "DivergenceRecord",
    "Evaluation",
    "Generation",
    "LayerRecord",
    "ModelRecord",
    "PhaseRecord",
    "QuantizationReport",
    "SizeRecord",
    "TaskEngine",
    "TaskResult",
    "TextRecord",
    "TokenDivergence",
    "check_folder",
    "read_evaluation",
    "read_report",
]

REPORT_FILE = "quantization_report.json"
EVALUATION_FILE = "evaluation.json"
VERSION: Literal[1] = 1
TaskEngine: TypeAlias = Literal["transformers", "vllm"]


class Record(BaseModel):
    # Files of a later release of the same version may have more fields.
    model_config = ConfigDict(extra="ignore", frozen=True)


class ModelRecord(Record):
    source: str = Field(description="folder or name that the model was loaded from")
    revision: str | None = Field(default=None, description="commit on the hub, where there is one")
    architecture: str = Field(description="class of the model")
    parameters: int = Field(description="number of parameters, tied ones once")


class DataRecord(Record):
    source: str | None = Field(description="what `dataset` was, as text; None for data in memory")
    samples: int = Field(description="number of calibration samples")
    tokens: int = Field(description="of all samples, without padding")
    max_length: int = Field(description="tokens of the longest sample")
    digest: str = Field(description="of the token ids of all samples, whatever their order")


class PhaseRecord(Record):
    """A phase that comes back, as tuning after each capture, is counted once, with sums."""

    name: str = Field(
        description="`preparation`, `generation`, `choosing`, `capture`, `search`, `rounding`, "
        "`tuning`, `advancing`, `distillation` or `saving`"
    )
    seconds: float = Field(description="sum of its times")
    peak_host_bytes: int = Field(description="largest resident size of the process, sampled")
    peak_device_bytes: int = Field(description="largest size allocated on the device; 0 on a CPU")


class BlockRecord(Record):
    """Losses are those of tuning, per token, on calibration samples set aside."""

    name: str = Field(description="of the block, or of those that were tuned together")
    initial_loss: float | None = Field(description="before tuning; None if it had NaN or infinity")
    best_loss: float | None = Field(description="of the rounding that was kept; None likewise")
    best_iteration: int = Field(description="0 is the rounding that tuning started from")
    seconds: float = Field(description="of tuning")
    scarce_experts: int = Field(
        default=0, description="layers of experts that saw too few tokens to be tuned"
    )
    failure: str | None = Field(
        default=None, description="what had NaN or infinity, so that the initial rounding was kept"
    )


class LayerRecord(Record):
    """
    Errors are squared, relative to the squared length of what they are an error of: the layer's
    output on calibration samples (`error_of` is ``output``), or, where the layer was not tuned, its
    weight (``weight``).
    """

    name: str = Field(description="in the model")
    kind: str = Field(description="last part of the name, such as `q_proj`; experts have one kind")
    block: int | None = Field(description="number of the block that holds it; None outside blocks")
    scheme: str = Field(description="short name, such as `W2A16 G64`")
    bits_per_weight: float = Field(description="as saved, scales and zero points included")
    weights: int = Field(description="number of weights")
    error_of: Literal["output", "weight"] = Field(description="what its errors are errors of")
    initial_error: float | None = Field(
        description="of the rounding that tuning started from; None where nothing was tuned"
    )
    error: float | None = Field(
        description="of the rounding that was saved; None where another "
        "modifier quantized the layer, or no sample reached it"
    )
    moved: int = Field(
        default=0, description="values that differ from those that tuning started from"
    )
    tokens: int | None = Field(default=None, description="calibration tokens of an expert")


class SizeRecord(Record):
    original_bytes: int = Field(description="of the original's weights")
    saved_bytes: int = Field(description="of the checkpoint's weights")
    quantized_weights: int = Field(description="number of weights that are quantized")
    quantized_bits: float = Field(description="bits for each of them, as saved")


class AutoSchemeRecord(Record):
    budget: float = Field(description="`avg_bits` of the recipe")
    score: str = Field(description="how layers were scored")
    frontier: list[tuple[float, float]] = Field(description="bits and expected loss, ascending")
    chosen: tuple[float, float] = Field(description="bits and expected loss of the choice")
    layers: dict[str, int] = Field(description="number of layers by scheme")


class DistillationRecord(Record):
    initial_kl: float = Field(description="divergence from the original before, nats per token")
    final_kl: float = Field(description="the same after training")
    kept: bool = Field(description="whether the trained scales were saved")
    judged_on: str = Field(description="`held-out samples` or `training samples`")
    seconds: float = Field(description="of training")


class QuantizationReport(Record):
    version: Literal[1] = Field(default=VERSION, description="of this layout")
    versions: dict[str, str] = Field(description="of packages, Python and the operating system")
    device: str = Field(description="that tuning ran on")
    started: str = Field(description="ISO 8601, UTC")
    seconds: float = Field(description="of the whole run")
    command: list[str] | None = Field(description="the command line, where there was one")
    recipe: str = Field(description="YAML, as run")
    recipe_name: str | None = Field(
        default=None, description="of a shipped recipe, or of a file, without ending"
    )
    model: ModelRecord = Field(description="the original")
    data: DataRecord | None = Field(
        description="calibration data; None if there was none, or it cannot be read twice"
    )
    phases: list[PhaseRecord] = Field(description="in the order in which they began")
    blocks: list[BlockRecord] = Field(description="those that were tuned, in their order")
    layers: list[LayerRecord] = Field(description="those that are quantized")
    unquantized: list[str] = Field(description="linear layers and embeddings left in 16 bits")
    size: SizeRecord | None = Field(description="None until the model is saved")
    auto_scheme: AutoSchemeRecord | None = Field(
        default=None, description="the choice of schemes, where one was made"
    )
    distillation: DistillationRecord | None = Field(
        default=None, description="training of scales, where it ran"
    )


class TextRecord(Record):
    source: str = Field(description="file or name")
    digest: str = Field(description="as that of calibration data")
    samples: int = Field(description="number of samples")
    length: int = Field(description="tokens of each sample")


class DivergenceRecord(Record):
    kl: float = Field(description="Kullback-Leibler divergence from the original, nats per token")
    top1: float = Field(description="share of tokens at which both models rank the same one first")
    perplexity: float = Field(description="of the quantized model")
    original_perplexity: float = Field(description="of the original")


class Generation(Record):
    """How both models continue a text."""

    prompt: str = Field(description="the text")
    original: str = Field(description="what the original continues it with")
    quantized: str = Field(description="what the quantized model continues it with")


class TokenDivergence(Record):
    text: str = Field(description="of the token, as decoded")
    kl: float = Field(description="between the predictions of this token, in nats")
    same_top1: bool = Field(description="whether both models rank the same token first")


class TaskResult(Record):
    """One metric of one lm-evaluation-harness task, or of a group of tasks."""

    task: str = Field(description="name")
    metric: str = Field(description="name, such as `acc_norm`")
    filter: str | None = Field(default=None, description="name, where the task has several")
    shots: int | None = Field(default=None, description="examples before each question")
    original: float | None = Field(description="of the original; None if it was not evaluated")
    quantized: float = Field(description="of the quantized model")
    original_stderr: float | None = Field(default=None, description="standard error")
    quantized_stderr: float | None = Field(default=None, description="standard error")
    higher_is_better: bool | None = Field(default=None, description="what the harness says of it")
    group: str | None = Field(default=None, description="whose own result is a mean over this one")
    engine: TaskEngine | None = Field(
        default=None, description="that ran it here; None for results that were read from files"
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def recovery(self) -> float | None:
        """What the quantized model keeps of the original's result; 1 is all of it."""
        if self.original is None:
            return None
        best, part = self.original, self.quantized
        if self.higher_is_better is False:  # perplexities and bits per byte
            best, part = part, best
        return part / best if best else None


class Evaluation(Record):
    version: Literal[1] = Field(default=VERSION, description="of this layout")
    versions: dict[str, str] = Field(description="of packages, Python and the operating system")
    original: str = Field(description="folder or name")
    quantized: str = Field(description="folder or name")
    engine: TaskEngine = Field(
        default="transformers",
        description="that ran the tasks last; text and generations are those of Transformers",
    )
    commands: list[str] = Field(description="that gave these results, in order")
    text: TextRecord | None = Field(default=None, description="that divergence was measured on")
    divergence: DivergenceRecord | None = Field(
        default=None, description="of the quantized model from the original"
    )
    generations: list[Generation] = Field(default=[], description="by both models")
    tokens: list[TokenDivergence] = Field(default=[], description="of one sample text, in order")
    tasks: list[TaskResult] = Field(default=[], description="of both models")
    task_commands: list[str] = Field(
        default=[], description="of lm-evaluation-harness alone, with the same results as `tasks`"
    )


Read = TypeVar("Read", bound=Record)


def read_report(checkpoint: Path) -> QuantizationReport:
    """
    :param checkpoint: folder, or the file itself
    :raises CheckpointError: if it holds no report, or one that cannot be read
    """
    path = checkpoint / REPORT_FILE if checkpoint.is_dir() else checkpoint
    return _read(path, QuantizationReport)


def read_evaluation(checkpoint: Path) -> Evaluation | None:
    """
    :param checkpoint: folder, or the file itself
    :return: None if it was not evaluated
    :raises CheckpointError: if its evaluation cannot be read
    """
    path = checkpoint / EVALUATION_FILE if checkpoint.is_dir() else checkpoint
    return _read(path, Evaluation) if path.is_file() else None


def check_folder(checkpoint: Path) -> None:
    """:raises CheckpointError: if it is a file, beside which nothing is looked for"""
    if checkpoint.is_file():
        raise CheckpointError(f"{checkpoint} is a file; name the folder of the checkpoint")


def _read(path: Path, kind: type[Read]) -> Read:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not there; `autoround-modifier quantize` writes it"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {described_problems(error)}") from error
