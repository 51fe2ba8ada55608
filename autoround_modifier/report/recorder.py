"""Collects what a run publishes, and makes a report of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoround_modifier.device import device_name
from autoround_modifier.host.layers import disable_onloading
from autoround_modifier.parallel import gathered
from autoround_modifier.progress.block_report import BlockReport
from autoround_modifier.progress.events import (
    BlockFinished,
    CalibrationDataFound,
    Event,
    LayerQuantized,
    PhaseEnded,
    PhaseStarted,
    Result,
    listening,
)
from autoround_modifier.report.layers import layer_records, unquantized_layers
from autoround_modifier.report.phases import PhaseClock
from autoround_modifier.report.schema import (
    AutoSchemeRecord,
    BlockRecord,
    DataRecord,
    DistillationRecord,
    LayerRecord,
    ModelRecord,
    QuantizationReport,
    SizeRecord,
)
from autoround_modifier.runs.calibration_data import calibration_digest, sample_lengths
from autoround_modifier.version import package_versions

__all__ = ["OriginalModel", "RunRecorder", "active_recorder", "recording"]

_active: ContextVar[RunRecorder | None] = ContextVar("recorder", default=None)

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "datasets")
FRONTIER_POINTS = 200


@dataclass(frozen=True)
class OriginalModel:
    """
    :ivar source: folder or name that it was loaded from
    :ivar revision: commit on the hub, where there is one
    :ivar architecture: name of its class
    :ivar parameters: number of them, tied ones once
    :ivar num_bytes: of these
    :ivar dtype: of most of its weights
    """

    source: str
    revision: str | None
    architecture: str
    parameters: int
    num_bytes: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any) -> OriginalModel:
        """:param model: of Transformers, before it is quantized"""
        with disable_onloading():
            sizes = [(p.numel(), p.nbytes, p.dtype) for p in model.parameters()]
        by_dtype: dict[torch.dtype, int] = {}
        for count, _, dtype in sizes:
            by_dtype[dtype] = by_dtype.get(dtype, 0) + count
        return cls(
            source=model.config._name_or_path,
            revision=getattr(model.config, "_commit_hash", None),
            architecture=type(model).__name__,
            parameters=sum(by_dtype.values()),
            num_bytes=sum(size for _, size, _ in sizes),
            dtype=max(by_dtype, key=by_dtype.__getitem__),
        )


class RunRecorder:
    """
    A listener of `progress.events`. Reports may be made while the run goes on.

    :param command: the command line that started the run; None where there was none
    :param recipe_name: of a shipped recipe, or of a file
    :param dataset: where the calibration data is from, in words
    :param model: name of the original; None for what its config says
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        recipe_name: str | None = None,
        dataset: str | None = None,
        model: str | None = None,
    ) -> None:
        self.model = model
        self.command = command
        self.recipe_name = recipe_name
        self.dataset = dataset
        self._started = datetime.now(timezone.utc)
        self._clock = PhaseClock("preparation")
        self._data: DataRecord | None = None
        self._blocks: list[BlockReport] = []
        self._weight_errors: dict[str, float] = {}
        self._choice: Any = None
        self._distillation: DistillationRecord | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case PhaseStarted(name):
                self._clock.enter(name)
            case PhaseEnded(name):
                self._clock.leave(name)
            case CalibrationDataFound(batches):
                self._data = self._data_record(batches)
            case LayerQuantized(name, error):
                self._weight_errors[name] = error
            case BlockFinished(_, BlockReport() as report):
                self._blocks.append(report)
            case Result("choosing", choice):
                self._choice = choice
            case Result("distillation", result):
                self._distillation = DistillationRecord(
                    initial_kl=result.initial_kl,
                    final_kl=result.final_kl,
                    kept=result.kept,
                    judged_on=result.judged_on,
                    seconds=result.seconds,
                )

    def start(self) -> None:
        """Watch the memory. Time counts since the recorder was made."""
        self._clock.start()

    def stop(self) -> None:
        """Called when the run has ended, however it ended."""
        self._clock.stop()

    def report(
        self,
        model: nn.Module,
        original: OriginalModel,
        recipe: str,
        budget: float | None,
        folder: Path | None,
        gguf_types: Mapping[str, str] | None = None,
    ) -> QuantizationReport:
        """
        :param model: quantized
        :param original: what it was
        :param recipe: YAML, as run
        :param budget: ``avg_bits`` of the recipe, where schemes were chosen
        :param folder: where it is saved; None if it is not
        :param gguf_types: of layers that were tuned in types of GGUF, and have no scheme any more:
            name -> type
        """
        types = gguf_types or {}
        tuned = {layer.name: layer for block in self._blocks for layer in block.layers}
        layers = layer_records(model, tuned, self._weight_errors, original.dtype, types)
        return QuantizationReport(
            versions=package_versions(*PACKAGES),
            device=device_name(),
            started=self._started.isoformat(timespec="seconds"),
            seconds=round((datetime.now(timezone.utc) - self._started).total_seconds(), 3),
            command=None if self.command is None else list(self.command),
            recipe=recipe,
            recipe_name=self.recipe_name,
            model=ModelRecord(
                source=self.model or original.source,
                revision=original.revision,
                architecture=original.architecture,
                parameters=original.parameters,
            ),
            data=self._data,
            phases=self._clock.records(),
            blocks=[_block_record(block) for block in self._blocks],
            layers=layers,
            unquantized=[name for name in unquantized_layers(model) if name not in types],
            # that of the GGUF file, which is not written yet, is not known
            size=None if folder is None or types else _size(layers, original, folder),
            auto_scheme=None if self._choice is None else _choice_record(self._choice, budget),
            distillation=self._distillation,
        )

    def _data_record(self, batches: object) -> DataRecord | None:
        shares = gathered(sample_lengths(batches))
        lengths = [length for share in shares for length in share or ()]
        if not lengths:
            return None
        return DataRecord(
            source=self.dataset,
            samples=len(lengths),
            tokens=sum(lengths),
            max_length=max(lengths),
            digest=calibration_digest(batches),
        )


@contextlib.contextmanager
def recording(recorder: RunRecorder) -> Iterator[None]:
    """
    Let a recorder listen, and `active_recorder` find it. Inside of another one nothing changes: the
    outer one goes on.
    """
    if _active.get() is not None:
        yield
        return
    token = _active.set(recorder)
    recorder.start()
    try:
        with listening(recorder):
            yield
    finally:
        recorder.stop()
        _active.reset(token)


def active_recorder() -> RunRecorder | None:
    """:return: the recorder of the run that goes on, if it has one"""
    return _active.get()


def _block_record(block: BlockReport) -> BlockRecord:
    return BlockRecord(
        name=block.name,
        initial_loss=_finite(block.initial_loss),
        best_loss=_finite(block.best_loss),
        best_iteration=block.best_iteration,
        seconds=block.seconds,
        scarce_experts=block.scarce_experts,
        failure=block.failure,
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _size(layers: list[LayerRecord], original: OriginalModel, folder: Path) -> SizeRecord:
    weights = sum(layer.weights for layer in layers)
    bits = sum(layer.bits_per_weight * layer.weights for layer in layers)
    return SizeRecord(
        original_bytes=original.num_bytes,
        saved_bytes=sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        quantized_weights=weights,
        quantized_bits=bits / weights if weights else 0.0,
    )


def _choice_record(choice: Any, budget: float | None) -> AutoSchemeRecord:
    points = choice.measurement.frontier()
    step = max(1, len(points) // FRONTIER_POINTS)
    layers: dict[str, int] = {}
    for unit, scheme in choice.pairs:
        layers[scheme] = layers.get(scheme, 0) + len(unit.layers)
    return AutoSchemeRecord(
        budget=choice.avg_bits() if budget is None else budget,
        score=choice.measurement.score,
        frontier=points[::step],
        chosen=(choice.avg_bits(), choice.score),
        layers=layers,
    )
