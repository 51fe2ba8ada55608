"""A whole evaluation: all that was asked for is checked before a model is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedTokenizerBase

from autoround_modifier import defaults
from autoround_modifier.errors import EvaluationError
from autoround_modifier.evaluation.divergence import TokenStatistics, mean_divergence
from autoround_modifier.evaluation.generations import (
    Prompt,
    generate,
    prompt_text,
    read_prompts,
)
from autoround_modifier.evaluation.models import check_models, free_memory, load, load_tokenizer
from autoround_modifier.evaluation.predictions import compare_with_recorded, record_predictions
from autoround_modifier.evaluation.results_files import read_results
from autoround_modifier.evaluation.task_results import task_results
from autoround_modifier.evaluation.tasks import Harness, TaskSettings, task_command
from autoround_modifier.evaluation.text import (
    EvaluationText,
    check_not_calibrated_on,
    read_text,
)
from autoround_modifier.evaluation.tokens import token_divergences
from autoround_modifier.inference.backends import TRANSFORMERS
from autoround_modifier.inference.choice import check_backend, default_device
from autoround_modifier.inference.loading import load as load_packed
from autoround_modifier.report.schema import (
    REPORT_FILE,
    DivergenceRecord,
    Evaluation,
    Generation,
    TaskResult,
    read_report,
)
from autoround_modifier.version import package_versions

__all__ = ["EvaluationSettings", "check_evaluation", "evaluate_checkpoint"]

PACKAGES = ("torch", "transformers", "compressed-tensors", "lm_eval", "vllm")


@dataclass(frozen=True)
class EvaluationSettings:
    """
    :param divergence: compare predictions on a text
    :param text: file of the text; None for the packaged one
    :param match: columns of the file and the values that a row must have
    :param num_samples: largest number of samples of the text
    :param length: tokens of each sample
    :param generations: compare what the models write
    :param prompts: file of prompts; None for the packaged ones
    :param max_new_tokens: in each generation
    :param tasks: of lm-evaluation-harness; None for none
    :param original_results: its results for the original, instead of a run
    :param quantized_results: for the quantized model
    :param dtype: of the weights in memory
    :param backend: what runs the quantized model, but not its tasks: one of `inference.load`
    :param trust_remote_code: let models run their own code
    """

    divergence: bool = True
    text: Path | None = None
    match: Mapping[str, str] = field(default_factory=dict)
    num_samples: int = defaults.EVALUATION_SAMPLES
    length: int = defaults.EVALUATION_LENGTH
    generations: bool = True
    prompts: Path | None = None
    max_new_tokens: int = defaults.MAX_NEW_TOKENS
    tasks: TaskSettings | None = None
    original_results: Path | None = None
    quantized_results: Path | None = None
    dtype: str = "auto"
    backend: str = TRANSFORMERS
    trust_remote_code: bool = False


def check_evaluation(original: str, settings: EvaluationSettings) -> None:
    """
    Refuse what `evaluate_checkpoint` would refuse of any quantized model, before there is one.

    :param original: folder, or name on the Hugging Face Hub
    :raises EvaluationError: if a text, prompts, tasks or results cannot be read
    :raises MissingExtraError: if tasks are asked for and lm-evaluation-harness is not installed
    """
    _Prepared.of(original, settings)


def evaluate_checkpoint(
    original: str,
    quantized: str,
    settings: EvaluationSettings,
    *,
    original_name: str | None = None,
    command: str | None = None,
) -> Evaluation:
    """
    Compare a quantized model with its original. One model at a time is in memory; the original's
    predictions are kept in a temporary folder (TMPDIR) meanwhile.

    :param original: folder, or name on the Hugging Face Hub
    :param quantized: likewise
    :param original_name: as the evaluation calls the original, where it was downloaded elsewhere
    :param command: that asked for this
    :return: not saved; see `save_evaluation`
    :raises EvaluationError: if something that was asked for cannot be done, found out before a
        model is loaded; or if results cannot be compared
    :raises BackendError: if the backend is not there, or does not run the quantized model
    :raises MissingExtraError: if tasks are asked for and lm-evaluation-harness is not installed
    """
    check_backend(settings.backend, default_device())
    positions = None
    if settings.divergence or settings.generations:
        positions = check_models((original, quantized), settings.trust_remote_code)
    if positions is not None and settings.length > positions:
        logger.info(f"samples have {positions} tokens: the model has positions for no more")
        settings = replace(settings, length=positions)
    prepared = _Prepared.of(original, settings)
    rows, harness, prompts = prepared.rows, prepared.harness, prepared.prompts
    tokenizer, text = prepared.tokenizer, prepared.text
    if text is not None and (Path(quantized) / REPORT_FILE).is_file():
        check_not_calibrated_on(text.record, read_report(Path(quantized)).data, settings.match)

    statistics: list[TokenStatistics] = []
    written: list[list[str]] = []
    if tokenizer is not None:
        with tempfile.TemporaryDirectory(prefix="predictions-") as folder:
            for name, is_quantized in ((original, False), (quantized, True)):
                logger.info(f"loading {name}")
                statistics, continuations = _run(
                    name, tokenizer, text, prompts, Path(folder), settings, is_quantized
                )
                written.append(continuations)
                free_memory()
    tasks, task_commands, harness_version = rows.compared(
        harness, original, quantized, settings.tasks
    )
    return Evaluation(
        versions=package_versions(*PACKAGES) | harness_version,
        original=original_name or original,
        quantized=quantized,
        engine=settings.tasks.engine if settings.tasks else "transformers",
        commands=[] if command is None else [command],
        text=None if text is None else text.record,
        divergence=None if text is None else _means(statistics),
        generations=[
            Generation(prompt=prompt_text(prompt), original=first, quantized=second)
            for prompt, first, second in zip(prompts, *written, strict=True)
        ]
        if prompts
        else [],
        tokens=token_divergences(tokenizer, text.samples[0].tolist(), statistics[0])
        if tokenizer is not None and text is not None
        else [],
        tasks=tasks,
        task_commands=task_commands,
    )


def _means(statistics: list[TokenStatistics]) -> DivergenceRecord:
    found = mean_divergence(statistics)
    return DivergenceRecord(
        kl=found.kl,
        top1=found.top1,
        perplexity=found.perplexity,
        original_perplexity=found.reference_perplexity,
    )


def _run(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    text: EvaluationText | None,
    prompts: tuple[Prompt, ...],
    folder: Path,
    settings: EvaluationSettings,
    is_quantized: bool,
) -> tuple[list[TokenStatistics], list[str]]:
    """:return: statistics of the quantized model, nothing of the original; continuations"""
    if is_quantized and settings.backend != TRANSFORMERS:
        model = load_packed(
            name,
            settings.backend,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
    else:
        model = load(name, settings.dtype, settings.trust_remote_code)
    statistics: list[TokenStatistics] = []
    if text is not None and is_quantized:
        statistics = compare_with_recorded(model, text.samples, folder)
    elif text is not None:
        record_predictions(model, text.samples, folder)
    return statistics, generate(model, tokenizer, prompts, settings.max_new_tokens)


@dataclass(frozen=True)
class _Prepared:
    """
    What an evaluation needs beside the models; None for what is not asked for.

    :param harness: of the tasks that must be run
    """

    rows: _Results
    harness: Harness | None
    prompts: tuple[Prompt, ...]
    tokenizer: PreTrainedTokenizerBase | None
    text: EvaluationText | None

    @classmethod
    def of(cls, original: str, settings: EvaluationSettings) -> _Prepared:
        """:raises EvaluationError: see `evaluate_checkpoint`"""
        rows = _Results.read(settings)
        harness = tokenizer = text = None
        if settings.tasks is not None and not rows.complete:
            harness = Harness(original, settings.tasks)
        prompts = read_prompts(settings.prompts) if settings.generations else ()
        if settings.divergence or settings.generations:
            tokenizer = load_tokenizer(original, settings.trust_remote_code)
        if settings.divergence and tokenizer is not None:
            text = read_text(
                settings.text, tokenizer, settings.num_samples, settings.length, settings.match
            )
        return cls(rows, harness, prompts, tokenizer, text)


@dataclass(frozen=True)
class _Results:
    """Results of lm-evaluation-harness that are there before anything runs."""

    original: dict[str, Any] | None
    quantized: dict[str, Any] | None

    @classmethod
    def read(cls, settings: EvaluationSettings) -> _Results:
        first, second = settings.original_results, settings.quantized_results
        if settings.tasks is None and first is not None and second is None:
            raise EvaluationError(
                "--original-results is there to be compared with: add --tasks, which are then run "
                "for the quantized model alone, or --quantized-results"
            )
        found = cls(
            None if first is None else read_results(first),
            None if second is None else read_results(second),
        )
        if found.complete:
            task_results(found.original, found.quantized or {})  # refuses different settings
        return found

    @property
    def complete(self) -> bool:
        return self.original is not None and self.quantized is not None

    def compared(
        self,
        harness: Harness | None,
        original: str,
        quantized: str,
        settings: TaskSettings | None,
    ) -> tuple[list[TaskResult], list[str], dict[str, str]]:
        """
        Run what is missing.

        :return: rows; the commands with the same results; the version of lm-evaluation-harness
        """
        first, second = self.original, self.quantized
        commands, engine = [], None
        if harness is not None and settings is not None:
            if first is None:
                first = harness.run(original)
                commands.append(task_command(original, settings))
                free_memory()
            if second is None:
                second, engine = harness.run(quantized), settings.engine
                commands.append(task_command(quantized, settings))
                free_memory()
        if second is None:
            return [], commands, {}
        version = second.get("lm_eval_version")
        versions = {"lm_eval": str(version)} if version else {}
        return task_results(first, second, engine), commands, versions
