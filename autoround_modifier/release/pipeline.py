"""
Makes a release, checkpoint by checkpoint: quantize, evaluate, judge, report, publish. Steps that
are done are not done again, so that a release that stopped goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from autoround_modifier.command import quoted_command_line
from autoround_modifier.errors import FailedError, OutputExistsError
from autoround_modifier.evaluation.results import save_evaluation
from autoround_modifier.evaluation.run import (
    EvaluationSettings,
    check_evaluation,
    evaluate_checkpoint,
)
from autoround_modifier.evaluation.tasks import TaskSettings, results_of
from autoround_modifier.hub import resolve_model
from autoround_modifier.hub.upload import check_before_upload, check_repository, upload_checkpoint
from autoround_modifier.job import QuantizationJob
from autoround_modifier.progress.events import Listener
from autoround_modifier.readable import percent_text
from autoround_modifier.recipe_composition import compose_recipe
from autoround_modifier.recipe_files import recipe_name
from autoround_modifier.release.file import CheckpointEntry, Demands, ReleaseFile
from autoround_modifier.release.finished_steps import FinishedSteps
from autoround_modifier.report.card import CardOptions, write_card
from autoround_modifier.report.page import check_matplotlib, write_page
from autoround_modifier.report.schema import REPORT_FILE, Evaluation, read_evaluation
from autoround_modifier.runs.digests import text_digest

__all__ = ["Released", "run_release"]

# Beside the checkpoints: finished blocks, notes on steps, results of tasks
WORK = ".release"


@dataclass(frozen=True)
class Released:
    """
    :ivar name: of the checkpoint
    :ivar folder: that holds it
    :ivar shortfalls: demands that it does not reach; empty if it is kept
    :ivar url: where it was published, if it was
    """

    name: str
    folder: Path
    evaluation: Evaluation
    shortfalls: tuple[str, ...]
    url: str | None = None

    def facts(self) -> dict[str, Any]:
        """:return: JSON values"""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "kept": not self.shortfalls,
            "shortfalls": list(self.shortfalls),
            "recovery": mean_recovery(self.evaluation),
            "url": self.url,
        }

    def __str__(self) -> str:
        text = f"{self.name}: {'not kept' if self.shortfalls else 'kept'}"
        if self.evaluation.divergence is not None:
            text += f", KL divergence {self.evaluation.divergence.kl:.4f}"
        recovery = mean_recovery(self.evaluation)
        if recovery is not None:
            text += f", recovery {percent_text(recovery)}"
        text += "".join(f"\n  {shortfall}" for shortfall in self.shortfalls)
        return f"{text}\n  {self.url or self.folder}"


def run_release(
    release: ReleaseFile,
    listener: Listener | None = None,
    dry_run: bool = False,
) -> list[Released]:
    """
    Everything that can be refused is refused before the first step.

    :param release: what to make
    :param listener: of what happens, for progress
    :param dry_run: only check
    :return: the checkpoints, in the order of the file; empty for a dry run
    :raises FailedError: if a step fails; says what is kept
    :raises RecipeError: and the other errors of `QuantizationJob.check` and `check_evaluation`
    :raises MissingExtraError: if a package is not installed that a step needs
    """
    check_matplotlib()
    model = resolve_model(release.model, release.platform, release.revision)
    steps = [_Checkpoint(release, entry, model) for entry in release.checkpoints]
    for checkpoint in steps:
        checkpoint.check()
    check_evaluation(model, steps[0].evaluation_settings())
    if dry_run:
        return []
    made = []
    for checkpoint in steps:
        try:
            made.append(checkpoint.make(listener))
        except BaseException as error:
            kept = ", ".join(one.name for one in made) or "no checkpoint is finished"
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            raise FailedError(
                f"{checkpoint.entry.name}: {what or type(error).__name__}\nfinished: {kept}. "
                "Steps that are done are kept; the same command goes on after them"
            ) from error
    return made


@dataclass
class _Checkpoint:
    release: ReleaseFile
    entry: CheckpointEntry
    model: str

    def __post_init__(self) -> None:
        release = self.release
        self.folder = release.output / self.entry.name
        work = release.output / WORK / self.entry.name
        self.steps = FinishedSteps(work / "steps.json")
        self.quantized_with = {
            "model": self.model,
            "revision": release.revision,
            "recipe": self._recipe({}),
            "dataset": release.data.dataset,
            "max_seq_length": release.data.max_seq_length,
        }
        self.evaluated_with = {
            "quantized": self.quantized_with,
            **release.evaluation.model_dump(mode="json"),
        }
        # Finished blocks of other settings are left alone.
        self.blocks = work / f"blocks-{text_digest(self.quantized_with)[:8]}"
        data = release.data
        self.job = QuantizationJob(
            model=self.model,
            model_name=release.model,
            recipe=self._recipe({"checkpoint_dir": str(self.blocks)}),
            max_seq_length=data.max_seq_length,
            recipe_name=recipe_name(self.entry.recipe),
            dataset=data.dataset,
            revision=release.revision,
            trust_remote_code=release.trust_remote_code,
        )

    def _recipe(self, more: dict[str, Any]) -> str:
        entry = self.entry
        scheme = {} if entry.scheme is None else {"scheme": entry.scheme}
        fields = {**scheme, **entry.fields, **more}
        return compose_recipe(
            entry.recipe, fields, entry.auto_scheme, entry.distillation, entry.settings
        )

    def check(self) -> None:
        """
        :raises OutputExistsError: if its folder holds what was not made with these settings
        :raises HubError: if it is to be published and cannot be
        """
        publish = self.release.publish
        if publish is not None and self.repository is not None:
            check_repository(self.repository, publish.platform)
        if self.is_quantized:
            return
        if (self.folder / REPORT_FILE).is_file():
            raise OutputExistsError(
                f"{self.folder} was made with other settings than the file has now: give the "
                "checkpoint another name, or delete the folder"
            )
        self.job.check(self.folder)

    @property
    def repository(self) -> str | None:
        """Where it is published; None where it is not."""
        publish = self.release.publish
        return None if publish is None else f"{publish.owner}/{self.entry.name}"

    @property
    def is_quantized(self) -> bool:
        # The note is made before the run, and the report appears when the run has saved.
        noted = self.steps.is_done("quantize", self.quantized_with)
        return noted and (self.folder / REPORT_FILE).is_file()

    def make(self, listener: Listener | None) -> Released:
        name = self.entry.name
        if not self.is_quantized:
            self.steps.note("quantize", self.quantized_with)
            logger.info(f"quantizing {name}")
            self.job.run(self.folder, listener)
        shutil.rmtree(self.blocks, ignore_errors=True)  # they are in the checkpoint
        evaluation = read_evaluation(self.folder)
        if evaluation is None or not self.steps.is_done("evaluate", self.evaluated_with):
            logger.info(f"evaluating {name}")
            evaluation = save_evaluation(self._evaluate(), self.folder, replace=True)
            self.steps.note("evaluate", self.evaluated_with)
        shortfalls = tuple(_shortfalls(self.release.keep, evaluation))
        write_page(self.folder)
        if shortfalls:
            return Released(name, self.folder, evaluation, shortfalls)
        publish = self.release.publish
        _, card = write_card(
            self.folder,
            CardOptions(
                repo=self.repository,
                license=self.release.license,
                language=tuple(self.release.language),
            ),
        )
        for part, reason in card.left_out:
            logger.info(f"{name}: the card leaves out {part} ({reason})")
        url = None
        if publish is not None and self.repository is not None:
            check_before_upload(self.folder)
            url = upload_checkpoint(
                self.folder, self.repository, platform=publish.platform, private=publish.private
            ).url
        return Released(name, self.folder, evaluation, (), url)

    def evaluation_settings(self) -> EvaluationSettings:
        asked = self.release.evaluation
        tasks = original_results = None
        if asked.tasks:
            settings = text_digest(asked.model_dump(mode="json"))[:8]
            results = self.release.output / WORK / f"results-{settings}"
            tasks = TaskSettings(
                tasks=tuple(asked.tasks),
                task_path=asked.task_path,
                engine=asked.engine,
                limit=asked.limit,
                num_fewshot=asked.num_fewshot,
                apply_chat_template=asked.apply_chat_template,
                batch_size=asked.batch_size,
                model_args=asked.model_args,
                trust_remote_code=self.release.trust_remote_code,
                results_folder=results,
            )
            # The original runs once for all checkpoints.
            known = results_of(self.model, results)
            original_results = known if known.is_dir() else None
        return EvaluationSettings(
            text=asked.text,
            match=asked.match,
            num_samples=asked.samples,
            length=asked.length,
            prompts=asked.prompts,
            tasks=tasks,
            original_results=original_results,
            trust_remote_code=self.release.trust_remote_code,
        )

    def _evaluate(self) -> Evaluation:
        return evaluate_checkpoint(
            self.model,
            str(self.folder),
            self.evaluation_settings(),
            original_name=self.release.model,
            command=quoted_command_line(),
        )


def _shortfalls(demands: Demands, evaluation: Evaluation) -> Iterator[str]:
    """Yield each demand that is not reached, in words."""
    recovery = mean_recovery(evaluation)
    least = demands.min_recovery
    if least is not None and (recovery is None or recovery < least):
        found = "unknown" if recovery is None else percent_text(recovery)
        yield f"recovery is {found}, and at least {percent_text(least)} is demanded"
    divergence = evaluation.divergence
    if divergence is None:
        if demands.max_kl is not None or demands.min_top1 is not None:
            yield "the divergence from the original is unknown"
        return
    if demands.max_kl is not None and divergence.kl > demands.max_kl:
        yield f"KL divergence is {divergence.kl:.4f}, and at most {demands.max_kl} is demanded"
    if demands.min_top1 is not None and divergence.top1 < demands.min_top1:
        found, wanted = percent_text(divergence.top1), percent_text(demands.min_top1)
        yield f"top-1 agreement is {found}, and at least {wanted} is demanded"


def mean_recovery(evaluation: Evaluation) -> float | None:
    """:return: mean over the tasks; None if there is none"""
    found = [x for task in evaluation.tasks if (x := task.recovery) is not None]
    return sum(found) / len(found) if found else None
