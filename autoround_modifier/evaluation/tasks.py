"""Runs tasks of lm-evaluation-harness, in this process or by its program."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoround_modifier.errors import EvaluationError, MissingExtraError
from autoround_modifier.evaluation.results_files import read_results
from autoround_modifier.report.schema import TaskEngine

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["Harness", "TaskSettings", "results_of", "task_command"]

# What lm-evaluation-harness calls the engines
_MODELS = {"transformers": "hf", "vllm": "vllm"}
# On a CPU, finding the largest batch would try one of 64 samples of full length.
CPU_BATCH_SIZE = 8


@dataclass(frozen=True)
class TaskSettings:
    """
    Arguments of `lm_eval.simple_evaluate`.

    :param tasks: names of tasks and of groups of them, ``*`` for any part of a name
    :param task_path: folder of further tasks, as YAML files
    :param engine: that runs the model
    :param limit: samples of each task, for trials; None for all
    :param num_fewshot: examples in each prompt; None for what each task says
    :param apply_chat_template: put prompts into the model's chat template
    :param batch_size: number, or ``auto`` for the largest that fits
    :param model_args: further arguments of the model of that engine, such as
        ``tensor_parallel_size``
    :param dtype: of the weights in memory
    :param trust_remote_code: let a model run its own code
    :param results_folder: where lm-evaluation-harness writes its own file of results
    :param program: ``lm_eval`` of another environment, which then runs the tasks; None to run them
        in this process
    """

    tasks: tuple[str, ...]
    task_path: Path | None = None
    engine: TaskEngine = "transformers"
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: str = "auto"
    model_args: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    dtype: str = "auto"
    trust_remote_code: bool = False
    results_folder: Path | None = None
    program: Path | None = None


class Harness:
    """
    Tasks that are found, ready to be run for one model after another.

    :param model: any of the models; a few tasks read its tokenizer
    :raises MissingExtraError: if lm-evaluation-harness is not installed
    :raises EvaluationError: if there is no such task, folder or program, or vLLM is asked for and
        cannot be imported. A program of another environment says itself which tasks it lacks
    """

    def __init__(self, model: str, settings: TaskSettings):
        self._settings = settings
        if settings.program is not None:
            if shutil.which(settings.program) is None:
                raise EvaluationError(f"--lm-eval: {settings.program} is no program")
            return
        if settings.engine == "vllm":
            _check_vllm()
        self._manager = _task_manager(settings, _model_arguments(model, settings))
        self._tasks = _named_tasks(settings.tasks, self._manager)

    def run(self, model: str) -> dict[str, Any]:
        """
        :param model: folder, or name on the Hub
        :return: what `lm_eval.simple_evaluate` returns: ``results``, ``groups``, ``n-shot``, ...
        :raises RuntimeError: if the program of another environment fails
        """
        if self._settings.program is not None:
            return _run_program(self._settings.program, model, self._settings)
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        settings = self._settings
        folder = settings.results_folder
        tracker = EvaluationTracker(output_path=None if folder is None else str(folder))
        results = simple_evaluate(
            model=_MODELS[settings.engine],
            model_args=_model_arguments(model, settings),
            tasks=list(self._tasks),
            num_fewshot=settings.num_fewshot,
            batch_size=_batch_size(settings),
            device=_device(settings),
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
            log_samples=False,
            evaluation_tracker=tracker,
            task_manager=self._manager,
        )
        if results is None:
            raise EvaluationError("lm-evaluation-harness returned no results in this process")
        found = dict(results)
        if folder is not None:
            tracker.save_results_aggregated(found)
        return found


def task_command(model: str, settings: TaskSettings) -> str:
    """:return: the command line of lm-evaluation-harness that does what `Harness.run` does"""
    return shlex.join(["lm_eval", *_command_arguments(model, settings)])


def _command_arguments(model: str, settings: TaskSettings) -> list[str]:
    pairs = ",".join(f"{k}={v}" for k, v in _model_arguments(model, settings).items())
    parts = ["--model", _MODELS[settings.engine], "--model_args", pairs]
    parts += ["--tasks", ",".join(settings.tasks), "--batch_size", str(_batch_size(settings))]
    device = _device(settings)
    if device is not None:
        parts += ["--device", device]
    if settings.task_path is not None:
        parts += ["--include_path", str(settings.task_path)]
    if settings.num_fewshot is not None:
        parts += ["--num_fewshot", str(settings.num_fewshot)]
    if settings.limit is not None:
        parts += ["--limit", str(settings.limit)]
    if settings.apply_chat_template:
        parts += ["--apply_chat_template", "--fewshot_as_multiturn"]
    return parts


def _run_program(program: Path, model: str, settings: TaskSettings) -> dict[str, Any]:
    """:return: the results that `lm_eval` of another environment wrote"""
    with tempfile.TemporaryDirectory(prefix="lm_eval-") as temporary:
        arguments = [*_command_arguments(model, settings), "--output_path", temporary]
        ended = subprocess.run([program, *arguments], stdout=subprocess.PIPE, text=True)
        sys.stderr.write(ended.stdout)
        if ended.returncode != 0:
            raise RuntimeError(f"{program} ended with exit code {ended.returncode}; see above")
        if settings.results_folder is not None:
            shutil.copytree(temporary, settings.results_folder, dirs_exist_ok=True)
        return read_results(Path(temporary))


def _check_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f"--engine vllm: vLLM cannot be imported: {error}. Where it is in another environment, "
            "install lm_eval there, and name its program by `--lm-eval PATH/bin/lm_eval`"
        ) from error


def results_of(model: str, results_folder: Path) -> Path:
    """
    :param results_folder: of `TaskSettings`
    :return: the folder in which lm-evaluation-harness writes the results of a model
    """
    try:
        from lm_eval.utils import sanitize_model_name
    except ImportError as error:
        raise MissingExtraError("tasks", "lm_eval", "eval") from error
    return results_folder / sanitize_model_name(model)


def _model_arguments(model: str, settings: TaskSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {"pretrained": model, "dtype": settings.dtype}
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = True
    return arguments | dict(settings.model_args)


def _device(settings: TaskSettings) -> str | None:
    """:return: None where the engine finds it itself; the harness knows CUDA's alone"""
    import torch

    if settings.engine == "vllm" or torch.cuda.is_available():
        return None
    return str(torch.accelerator.current_accelerator() or "cpu")


def _batch_size(settings: TaskSettings) -> str | int:
    if settings.batch_size != "auto":
        return int(settings.batch_size)
    return CPU_BATCH_SIZE if _device(settings) == "cpu" else "auto"


def _task_manager(settings: TaskSettings, arguments: Mapping[str, Any]) -> TaskManager:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("--tasks", "lm_eval", "eval") from error

    path = settings.task_path
    if path is not None and not path.is_dir():
        raise EvaluationError(f"--task-path: there is no folder {path}")
    folder, metadata = None if path is None else os.fspath(path), dict(arguments)
    if folder is not None:
        local = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        if _is_complete(local, settings.tasks):
            return local
    return TaskManager(include_path=folder, metadata=metadata)


def _is_complete(manager: TaskManager, names: Iterable[str]) -> bool:
    """
    :return: whether a folder has all that these names refer to, so that the harness' own fourteen
        thousand files need not be read
    """
    waiting, index = list(names), manager.task_index
    while waiting:
        entry = index.get(waiting.pop())
        if entry is None:
            return False
        members = (entry.cfg or {}).get("task")
        for member in members if isinstance(members, list) else []:
            name = member if isinstance(member, str) else member.get("task")
            if isinstance(name, str):
                waiting.append(name)
    return True


def _named_tasks(names: Iterable[str], manager: TaskManager) -> list[str]:
    """:return: names without wildcards"""
    matches = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, found in matches.items() if not found]
    if unknown or not matches:
        raise EvaluationError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists "
            "them, and `--task-path` adds a folder of your own"
        )
    return list(dict.fromkeys(name for found in matches.values() for name in found))
