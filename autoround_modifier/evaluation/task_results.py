"""What results of lm-evaluation-harness say of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autoround_modifier.errors import EvaluationError
from autoround_modifier.report.schema import TaskEngine, TaskResult

__all__ = ["check_comparable", "task_results"]

# Of the results of a task, what is no metric
_NO_METRICS = ("alias", "name", "sample_len", "sample_count", "samples")
# By task: what must be the same where two results are compared
_COMPARED = {"n-shot": "examples in the prompt", "versions": "version", "n-samples": "samples"}
# Of the whole run
_COMPARED_ONCE = {"chat_template_sha": "chat template", "fewshot_as_multiturn": "multiturn"}


def check_comparable(original: Mapping[str, Any], quantized: Mapping[str, Any]) -> None:
    """
    :param original: `Harness.run` or `read_results`
    :param quantized: likewise
    :raises EvaluationError: if a task was run in two ways: with other numbers of examples or
        samples, in another version, or with and without a chat template
    """
    different = []
    for key, meaning in _COMPARED.items():
        first, second = original.get(key) or {}, quantized.get(key) or {}
        different += [
            f"{task}: {meaning} {_said(first[task])} and {_said(second[task])}"
            for task in sorted(first.keys() & second.keys())
            if first[task] != second[task]
        ]
    # A model without chat template has none; others may have templates of their own.
    for key, meaning in _COMPARED_ONCE.items():
        if key in original and key in quantized and bool(original[key]) != bool(quantized[key]):
            used = "the original" if original[key] else "the quantized model"
            different.append(f"{meaning} only with {used}")
    if different:
        raise EvaluationError(
            "results of the original and of the quantized model cannot be compared: "
            + "; ".join(different)
        )


def task_results(
    original: Mapping[str, Any] | None,
    quantized: Mapping[str, Any],
    engine: TaskEngine | None = None,
) -> list[TaskResult]:
    """
    :param original: `Harness.run` or `read_results`; None if it was not run
    :param quantized: likewise
    :param engine: that ran the quantized model here; None for results of a file
    :return: a row for each metric of each task and group that the quantized model has
    :raises EvaluationError: if the two cannot be compared
    """
    if original is not None:
        check_comparable(original, quantized)
    reference = {} if original is None else _rows(original)
    shots, higher = quantized.get("n-shot") or {}, quantized.get("higher_is_better") or {}
    groups = _groups(quantized)
    found = []
    for (task, metric, filtered), (value, error) in _rows(quantized).items():
        first, first_error = reference.get((task, metric, filtered), (None, None))
        found.append(
            TaskResult(
                task=task,
                metric=metric,
                filter=filtered,
                shots=shots.get(task),
                original=first,
                quantized=value,
                original_stderr=first_error,
                quantized_stderr=error,
                higher_is_better=(higher.get(task) or {}).get(metric),
                group=groups.get(task),
                engine=engine,
            )
        )
    return found


def _rows(
    results: Mapping[str, Any],
) -> dict[tuple[str, str, str | None], tuple[float, float | None]]:
    """:return: task, metric and filter -> value and its standard error"""
    found = {}
    for task, values in (results["results"] | (results.get("groups") or {})).items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric in _NO_METRICS or metric.endswith("_stderr") or not _is_number(value):
                continue
            suffix = f",{filtered}" if filtered else ""
            error = values.get(f"{metric}_stderr{suffix}")
            shown = filtered if filtered not in ("", "none") else None
            found[task, metric, shown] = (
                float(value),
                float(error) if _is_number(error) else None,
            )
    return found


def _groups(results: Mapping[str, Any]) -> dict[str, str]:
    """:return: task or group -> the group whose own results are means over it"""
    with_results = {task for task, _, _ in _rows(results)}
    return {
        task: group
        for group, members in (results.get("group_subtasks") or {}).items()
        if group in with_results
        for task in members
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _said(value: Any) -> str:
    return str(value.get("effective", value) if isinstance(value, dict) else value)
