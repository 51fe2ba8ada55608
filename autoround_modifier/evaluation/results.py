"""``evaluation.json``: parts that were evaluated again replace the earlier ones."""

from __future__ import annotations

from pathlib import Path

from autoround_modifier.errors import EvaluationError
from autoround_modifier.report.schema import EVALUATION_FILE, Evaluation, read_evaluation
from autoround_modifier.runs.files import write_atomically

__all__ = ["check_mergeable", "merge_evaluations", "save_evaluation"]


def check_mergeable(earlier: Evaluation | None, original: str) -> None:
    """
    :param earlier: what a checkpoint has; None for nothing
    :param original: name of the original of a new evaluation
    :raises EvaluationError: if the earlier one is about another original
    """
    if earlier is not None and earlier.original != original:
        raise EvaluationError(
            f"{EVALUATION_FILE} compares with `{earlier.original}`, and this evaluation with "
            f"`{original}`: give the same name, replace the file with `--replace`, or leave it as "
            "it is with `--no-save`"
        )


def merge_evaluations(earlier: Evaluation | None, new: Evaluation) -> Evaluation:
    """
    :param earlier: of the same two models; None for nothing
    :param new: takes the place of each part that it has: text with divergence and tokens,
        generations, and each of its tasks
    :return: both together
    """
    if earlier is None:
        return new
    again = {result.task for result in new.tasks}
    kept = [result for result in earlier.tasks if result.task not in again]
    text = new if new.divergence is not None else earlier
    nothing_kept = not kept and text is new and (new.generations or not earlier.generations)
    commands = [] if nothing_kept else earlier.commands
    task_commands = earlier.task_commands if kept else []
    return Evaluation(
        versions=earlier.versions | new.versions,
        original=new.original,
        quantized=new.quantized,
        engine=new.engine if new.tasks else earlier.engine,
        commands=list(dict.fromkeys([*commands, *new.commands])),
        text=text.text,
        divergence=text.divergence,
        generations=new.generations or earlier.generations,
        tokens=text.tokens,
        tasks=kept + new.tasks,
        task_commands=list(dict.fromkeys([*task_commands, *new.task_commands])),
    )


def save_evaluation(new: Evaluation, path: Path, replace: bool = False) -> Evaluation:
    """
    :param path: of the file, or of the checkpoint that it belongs to
    :param replace: forget what the file holds
    :return: what was written: the new evaluation, and what the file held beside it
    :raises CheckpointError: if the file that is there cannot be read
    :raises EvaluationError: see `check_mergeable`
    """
    file = path / EVALUATION_FILE if path.is_dir() else path
    earlier = None if replace else read_evaluation(file)
    check_mergeable(earlier, new.original)
    merged = merge_evaluations(earlier, new)
    write_atomically(file, merged.model_dump_json(indent=2) + "\n")
    return merged
