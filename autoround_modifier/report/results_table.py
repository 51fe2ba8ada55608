"""Results of tasks as a table: benchmarks by category, with recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from autoround_modifier.readable import percent_text
from autoround_modifier.report.schema import TaskResult
from autoround_modifier.report.words import result_text

__all__ = ["ResultRow", "recovery_text", "result_rows"]

# The two sets that releases report, by the task names of lm-evaluation-harness
CATEGORIES = {
    "OpenLLM v1": (
        "arc_challenge",
        "gsm8k",
        "hellaswag",
        "mmlu",
        "winogrande",
        "truthfulqa_mc2",
    ),
    "OpenLLM v2": (
        "leaderboard_bbh",
        "leaderboard_gpqa",
        "leaderboard_ifeval",
        "leaderboard_math_hard",
        "leaderboard_mmlu_pro",
        "leaderboard_musr",
    ),
}
OTHERS = "Others"
# Of these, less is better. Files of the harness do not always say so.
LOSSES = ("perplexity", "bits_per_byte", "brier_score", "loss")


@dataclass(frozen=True)
class ResultRow:
    category: str
    benchmark: str
    original: str
    quantized: str
    recovery: str


def recovery_text(task: TaskResult) -> str:
    """:return: empty where the original has no result, or it is not known which is better"""
    if task.higher_is_better is None and task.metric.endswith(LOSSES):
        return ""
    if task.recovery is None:
        return ""
    return percent_text(task.recovery)


def result_rows(tasks: Sequence[TaskResult]) -> list[ResultRow]:
    """
    :param tasks: those that are part of a group are left out; the group has a result of its own
    :return: by category, each with the average below it, where it has two tasks or more, one
        metric of each, and all results of the original
    """
    rows = []
    for category in (*CATEGORIES, OTHERS):
        group = [x for x in tasks if x.group is None and _category(x.task) == category]
        rows += [_row(category, x) for x in group]
        originals = [x.original for x in group if x.original is not None]
        one_metric = len({x.task for x in group}) == len(group) == len(originals)
        if category != OTHERS and len(group) > 1 and one_metric:
            average = TaskResult(
                task="**Average**",
                metric="",
                original=fmean(originals),
                quantized=fmean(x.quantized for x in group),
            )
            rows.append(_row(category, average))
    return rows


def _category(task: str) -> str:
    return next((name for name, tasks in CATEGORIES.items() if task in tasks), OTHERS)


def _row(category: str, task: TaskResult) -> ResultRow:
    details = [task.metric] if task.metric else []
    if task.filter is not None:
        details.append(task.filter)
    if task.shots is not None:
        details.append(f"{task.shots}-shot")
    return ResultRow(
        category,
        f"{task.task} ({', '.join(details)})" if details else task.task,
        "" if task.original is None else result_text(task.original),
        result_text(task.quantized),
        recovery_text(task),
    )
