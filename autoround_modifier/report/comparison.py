"""Two checkpoints side by side, from the files beside their weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import BaseModel, Field

from autoround_modifier.checkpoints.saved_config import quantization_of
from autoround_modifier.checkpoints.saved_files import CONFIG, read_json
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.errors import CheckpointError
from autoround_modifier.report.schema import (
    EVALUATION_FILE,
    REPORT_FILE,
    DivergenceRecord,
    Evaluation,
    LayerRecord,
    QuantizationReport,
    TextRecord,
    read_evaluation,
    read_report,
)

__all__ = ["Comparison", "KindComparison", "Side", "TaskComparison", "compare_checkpoints"]


class Side(BaseModel):
    """What is known of one checkpoint; None for what its files do not say."""

    name: str
    model: str | None = Field(description="that it was made from")
    recipe: str | None = Field(description="name of the recipe")
    schemes: dict[str, int | None] = Field(
        description="number of layers by scheme; of a checkpoint without report, the schemes of "
        "config.json, without numbers"
    )
    quantized_bits: float | None = Field(description="for each quantized weight, as saved")
    saved_bytes: int | None
    original_bytes: int | None
    seconds: float | None = Field(description="of the run")
    text: TextRecord | None
    divergence: DivergenceRecord | None


class KindComparison(BaseModel):
    """
    One kind of layer whose schemes differ, such as ``q_proj``. Both lists have a value for each
    checkpoint.
    """

    kind: str
    schemes: list[dict[str, int]] = Field(description="number of layers by scheme")
    bits: list[float | None] = Field(description="mean over the weights, as saved")
    error: list[float | None] = Field(
        description="mean over the layers, where errors of both are of the same thing"
    )


class TaskComparison(BaseModel):
    """One metric of a task that one of the checkpoints at least was evaluated on."""

    task: str
    metric: str
    filter: str | None
    values: list[float | None]
    recovery: list[float | None] = Field(description="of the original's result")


class Comparison(BaseModel):
    """Lists have a value for each checkpoint, in their order."""

    sides: list[Side]
    same_text: bool = Field(description="whether the divergences are of the same text")
    kinds: list[KindComparison] = Field(description="of which the schemes differ")
    tasks: list[TaskComparison]


def compare_checkpoints(first: Path, second: Path) -> Comparison:
    """
    :param first: folder of a checkpoint, or its ``quantization_report.json``
    :param second: likewise
    :raises CheckpointError: if there is neither a report nor a ``config.json``, or a file cannot be
        read
    """
    files = [_read(path) for path in (first, second)]
    reports = [report for report, _, _ in files]
    evaluations = [evaluation for _, evaluation, _ in files]
    sides = [_side(path, *found) for path, found in zip((first, second), files, strict=True)]
    texts = [side.text.digest for side in sides if side.text is not None]
    return Comparison(
        sides=sides,
        same_text=len(texts) == 2 and len(set(texts)) == 1,
        kinds=_kinds(*reports),
        tasks=_tasks(evaluations),
    )


Files = tuple[QuantizationReport | None, Evaluation | None, Path]


def _read(path: Path) -> Files:
    """:return: report, evaluation and folder"""
    if not path.exists():
        raise CheckpointError(f"{path} is not there")
    folder = path if path.is_dir() else path.parent
    has_report = path.is_file() or (folder / REPORT_FILE).is_file()
    if not has_report and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds neither {REPORT_FILE} nor {CONFIG}")
    report = read_report(path) if has_report else None
    return report, read_evaluation(folder / EVALUATION_FILE), folder


def _side(
    path: Path, report: QuantizationReport | None, evaluation: Evaluation | None, folder: Path
) -> Side:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    size = None if report is None else report.size
    evaluated = None if evaluation is None else evaluation.original
    return Side(
        name=str(path),
        model=report.model.source if report else evaluated,
        recipe=report.recipe_name if report else None,
        schemes=dict(_schemes(report.layers)) if report else _configured_schemes(folder / CONFIG),
        quantized_bits=size.quantized_bits if size else None,
        saved_bytes=size.saved_bytes if size else (weights or None),
        original_bytes=size.original_bytes if size else None,
        seconds=report.seconds if report else None,
        text=evaluation.text if evaluation else None,
        divergence=evaluation.divergence if evaluation else None,
    )


def _schemes(layers: list[LayerRecord]) -> Counter[str]:
    return Counter(layer.scheme for layer in layers)


def _kinds(
    first: QuantizationReport | None, second: QuantizationReport | None
) -> list[KindComparison]:
    """:return: nothing where one has no report"""
    if first is None or second is None:
        return []
    found = []
    for kind in dict.fromkeys(layer.kind for layer in first.layers + second.layers):
        both = [[x for x in side.layers if x.kind == kind] for side in (first, second)]
        schemes = [dict(_schemes(layers)) for layers in both]
        if schemes[0] != schemes[1]:
            comparable = len({x.error_of for layers in both for x in layers}) == 1
            found.append(
                KindComparison(
                    kind=kind,
                    schemes=schemes,
                    bits=[_mean_bits(layers) for layers in both],
                    error=[_mean_error(layers) if comparable else None for layers in both],
                )
            )
    return found


def _mean_bits(layers: list[LayerRecord]) -> float | None:
    weights = sum(layer.weights for layer in layers)
    return sum(x.bits_per_weight * x.weights for x in layers) / weights if weights else None


def _mean_error(layers: list[LayerRecord]) -> float | None:
    errors = [layer.error for layer in layers if layer.error is not None]
    return sum(errors) / len(errors) if errors else None


def _tasks(evaluations: list[Evaluation | None]) -> list[TaskComparison]:
    rows = [
        {(row.task, row.metric, row.filter): row for row in evaluation.tasks if row.group is None}
        if evaluation
        else {}
        for evaluation in evaluations
    ]
    return [
        TaskComparison(
            task=key[0],
            metric=key[1],
            filter=key[2],
            values=[side[key].quantized if key in side else None for side in rows],
            recovery=[side[key].recovery if key in side else None for side in rows],
        )
        for key in dict.fromkeys(key for side in rows for key in side)
    ]


def _configured_schemes(path: Path) -> dict[str, int | None]:
    """:return: of a checkpoint without report, as far as its ``config.json`` says them"""
    quantization = quantization_of(read_json(path))
    if quantization is None:
        return {"not quantized": None}
    if "config_groups" in quantization:
        groups = quantization["config_groups"].values()
        schemes = (Scheme.of_group(group, quantization.get("format")) for group in groups)
        return {scheme.label: None for scheme in schemes if scheme is not None}
    bits, method = quantization.get("bits"), str(quantization.get("quant_method", "quantized"))
    return {f"{method} {bits} bits" if bits else method: None}
