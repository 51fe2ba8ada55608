"""
``quantization_report.json`` and ``evaluation.json``, the files beside a checkpoint from which its
page and its model card are made.

Fields may be added within a version; where one changes its meaning, the version is raised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoround_modifier.errors import CheckpointError

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
    "TaskResult",
    "TextRecord",
    "TokenDivergence",
    "read_evaluation",
    "read_report",
]

REPORT_FILE = "quantization_report.json"
EVALUATION_FILE = "evaluation.json"
VERSION: Literal[1] = 1


class Record(BaseModel):
    # Files of a later release of the same version may have more fields.
    model_config = ConfigDict(extra="ignore", frozen=True)


class ModelRecord(Record):
    source: str = Field(description="folder or name that the model was loaded from")
    revision: str | None = Field(default=None, description="commit on the hub, where there is one")
    architecture: str = Field(description="class of the model")
    parameters: int = Field(description="number of parameters, tied ones once")
    license: str | None = None


class DataRecord(Record):
    source: str | None = Field(description="what `dataset` was, as text; None for data in memory")
    samples: int
    tokens: int = Field(description="of all samples, without padding")
    max_length: int = Field(description="tokens of the longest sample")
    digest: str = Field(description="of the token ids of all samples, whatever their order")


class PhaseRecord(Record):
    """A phase that comes back, as tuning after each capture, is counted once, with sums."""

    name: str = Field(
        description="`preparation`, `choosing`, `capture`, `search`, `rounding`, "
        "`tuning`, `advancing`, `distillation` or `saving`"
    )
    seconds: float
    peak_host_bytes: int = Field(description="largest resident size of the process, sampled")
    peak_device_bytes: int = Field(description="largest size allocated on the device; 0 on a CPU")


class BlockRecord(Record):
    """Losses are those of tuning, per token, on calibration samples set aside."""

    name: str
    initial_loss: float | None = Field(description="None if it had NaN or infinity")
    best_loss: float | None
    best_iteration: int = Field(description="0 is the rounding that tuning started from")
    seconds: float
    scarce_experts: int = 0
    failure: str | None = None


class LayerRecord(Record):
    """
    Errors are squared, relative to the squared length of what they are an error of: the layer's
    output on calibration samples (`error_of` is ``output``), or, where the layer was not tuned, its
    weight (``weight``).
    """

    name: str
    kind: str = Field(description="last part of the name, such as `q_proj`; experts have one kind")
    block: int | None = Field(description="number of the block that holds it; None outside blocks")
    scheme: str = Field(description="short name, such as `W2 sym G64`")
    bits_per_weight: float = Field(description="as saved, scales and zero points included")
    weights: int = Field(description="number of weights")
    error_of: Literal["output", "weight"]
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
    original_bytes: int
    saved_bytes: int
    quantized_weights: int = Field(description="number of weights that are quantized")
    quantized_bits: float = Field(description="bits for each of them, as saved")


class AutoSchemeRecord(Record):
    budget: float = Field(description="`avg_bits` of the recipe")
    score: str = Field(description="how layers were scored")
    frontier: list[tuple[float, float]] = Field(description="bits and expected loss, ascending")
    chosen: tuple[float, float] = Field(description="bits and expected loss of the choice")
    layers: dict[str, int] = Field(description="number of layers by scheme")


class DistillationRecord(Record):
    initial_kl: float
    final_kl: float
    kept: bool
    judged_on: str
    seconds: float


class QuantizationReport(Record):
    version: Literal[1] = VERSION
    versions: dict[str, str] = Field(description="of packages, Python and the operating system")
    device: str
    started: str = Field(description="ISO 8601, UTC")
    seconds: float
    command: list[str] | None = Field(description="the command line, where there was one")
    recipe: str = Field(description="YAML, as run")
    recipe_name: str | None = Field(default=None, description="of a shipped recipe")
    model: ModelRecord
    data: DataRecord | None
    phases: list[PhaseRecord]
    blocks: list[BlockRecord]
    layers: list[LayerRecord]
    unquantized: list[str] = Field(description="linear layers and embeddings left in 16 bits")
    size: SizeRecord | None = Field(description="None until the model is saved")
    auto_scheme: AutoSchemeRecord | None = None
    distillation: DistillationRecord | None = None


class TextRecord(Record):
    source: str
    digest: str = Field(description="SHA-256 of the token ids")
    samples: int
    length: int = Field(description="tokens of each sample")


class DivergenceRecord(Record):
    kl: float = Field(description="Kullback-Leibler divergence from the original, nats per token")
    top1: float = Field(description="share of tokens at which both models rank the same one first")
    perplexity: float
    original_perplexity: float


class Generation(Record):
    prompt: str
    original: str
    quantized: str


class TokenDivergence(Record):
    text: str = Field(description="of the token, as decoded")
    kl: float = Field(description="between the predictions of this token, in nats")
    same_top1: bool


class TaskResult(Record):
    """One metric of one lm-evaluation-harness task."""

    task: str
    metric: str
    filter: str | None = None
    shots: int | None = None
    original: float | None
    quantized: float
    original_stderr: float | None = None
    quantized_stderr: float | None = None

    @property
    def recovery(self) -> float | None:
        """What the quantized model keeps of the original's result; 1 is all of it."""
        return self.quantized / self.original if self.original else None


class Evaluation(Record):
    version: Literal[1] = VERSION
    versions: dict[str, str]
    original: str
    quantized: str
    engine: Literal["transformers", "vllm"] = "transformers"
    commands: list[str] = Field(description="that gave these results, in order")
    text: TextRecord | None = None
    divergence: DivergenceRecord | None = None
    generations: list[Generation] = []
    tokens: list[TokenDivergence] = Field(default=[], description="of one sample text, in order")
    tasks: list[TaskResult] = []


Read = TypeVar("Read", bound=Record)


def read_report(checkpoint: Path) -> QuantizationReport:
    """
    :param checkpoint: folder
    :raises CheckpointError: if it holds no report, or one that cannot be read
    """
    return _read(checkpoint / REPORT_FILE, QuantizationReport)


def read_evaluation(checkpoint: Path) -> Evaluation | None:
    """
    :param checkpoint: folder
    :return: None if it was not evaluated
    :raises CheckpointError: if its evaluation cannot be read
    """
    path = checkpoint / EVALUATION_FILE
    return _read(path, Evaluation) if path.is_file() else None


def _read(path: Path, kind: type[Read]) -> Read:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not there; `autoround-modifier quantize` writes it"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
