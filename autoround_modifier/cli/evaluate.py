"""`evaluate`: how close a quantized model is to its original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoround_modifier import defaults
from autoround_modifier.cli.options import AsJson, Platform, TrustRemoteCode
from autoround_modifier.cli.outcome import UsageError
from autoround_modifier.cli.tables import print_json
from autoround_modifier.command import quoted_command_line
from autoround_modifier.report.schema import TaskEngine

__all__ = ["evaluate"]

TEXT, TASKS, RESULTS = "Text and generations", "Tasks", "Results"


DTYPES = ("auto", "bfloat16", "float16", "float32")


def evaluate(
    original: Annotated[str, typer.Argument(help="folder or name of the original model")],
    quantized: Annotated[str, typer.Argument(help="folder or name of the quantized one")],
    divergence: Annotated[
        bool | None,
        typer.Option(
            help="compare predictions on a text; the default unless --engine is vllm or there are "
            "only results to read",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, CSV, Parquet or plain text that calibration did not see; without it, "
            "a packaged text of 3,000 tokens",
            rich_help_panel=TEXT,
        ),
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE", help="use only such rows of --text", rich_help_panel=TEXT
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="largest number of samples of the text", rich_help_panel=TEXT)
    ] = defaults.EVALUATION_SAMPLES,
    length: Annotated[int, typer.Option(help="tokens of each", rich_help_panel=TEXT)] = (
        defaults.EVALUATION_LENGTH
    ),
    generations: Annotated[
        bool | None,
        typer.Option(
            help="compare what the models write; the default as for --divergence",
            rich_help_panel=TEXT,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="a prompt in each line, or JSON lines with `prompt` or `messages`",
            rich_help_panel=TEXT,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="in each generation", rich_help_panel=TEXT)
    ] = defaults.MAX_NEW_TOKENS,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="tasks and groups of lm-evaluation-harness, such as openllm,gsm8k",
            rich_help_panel=TASKS,
        ),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="folder of further tasks", rich_help_panel=TASKS)
    ] = None,
    engine: Annotated[
        TaskEngine, typer.Option(help="that runs the tasks", rich_help_panel=TASKS)
    ] = "transformers",
    limit: Annotated[
        int | None, typer.Option(help="samples of each task, for a trial", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            help="examples in each prompt; without it, what each task says", rich_help_panel=TASKS
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="put prompts of tasks into it", rich_help_panel=TASKS
        ),
    ] = False,
    batch_size: Annotated[
        str, typer.Option(help="of tasks: a number or auto", rich_help_panel=TASKS)
    ] = "auto",
    model_args: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="further arguments of the harness' model, such as tensor_parallel_size=2",
            rich_help_panel=TASKS,
        ),
    ] = None,
    lm_eval: Annotated[
        Path | None,
        typer.Option(
            metavar="PROGRAM",
            help="lm_eval of another environment, which runs the tasks: that of vLLM",
            rich_help_panel=TASKS,
        ),
    ] = None,
    original_results: Annotated[
        Path | None,
        typer.Option(
            help="file or folder of an earlier lm_eval of the original, instead of a run",
            rich_help_panel=TASKS,
        ),
    ] = None,
    quantized_results: Annotated[
        Path | None,
        typer.Option(help="the same, of the quantized model", rich_help_panel=TASKS),
    ] = None,
    save_results: Annotated[
        Path | None,
        typer.Option(
            help="folder in which the harness leaves its own files of results",
            rich_help_panel=TASKS,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="file to write; without it, evaluation.json in the folder of the quantized model",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    save: Annotated[bool, typer.Option(help="write a file", rich_help_panel=RESULTS)] = True,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="forget what the file holds already", rich_help_panel=RESULTS
        ),
    ] = False,
    as_json: AsJson = False,
    platform: Platform = None,
    dtype: Annotated[str, typer.Option(help=f"of weights in memory: {', '.join(DTYPES)}")] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="what runs the quantized model, but not its tasks, in Transformers: auto keeps "
            "its weights packed in memory (guide: loading)"
        ),
    ] = "transformers",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare a quantized model with its original: on a text, in what it writes, on tasks."""
    only_read = bool(original_results or quantized_results) and tasks is None
    runs_here = engine == "transformers" and not only_read
    wants_text = runs_here or text is not None if divergence is None else divergence
    wants_generations = runs_here or prompts is not None if generations is None else generations
    if not (wants_text or wants_generations or tasks or original_results or quantized_results):
        raise UsageError("nothing to evaluate: give --tasks, or leave out --no-divergence")
    if text is not None and not wants_text:
        raise UsageError("--text needs --divergence")
    if engine == "vllm" and tasks is None:
        raise UsageError("--engine vllm runs tasks: give --tasks")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: `{dtype}` is none of {', '.join(DTYPES)}")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
        raise UsageError("--batch-size: give a number of at least 1, or auto")

    wanted_rows = _pairs(match or [], "--match")
    arguments = _pairs(model_args.split(",") if model_args else [], "--model-args")

    from autoround_modifier.cli.logs import own_logs

    with own_logs():
        from autoround_modifier.evaluation.results import check_mergeable, save_evaluation
        from autoround_modifier.evaluation.run import EvaluationSettings, evaluate_checkpoint
        from autoround_modifier.evaluation.tasks import TaskSettings
        from autoround_modifier.hub import resolve_model
        from autoround_modifier.report.schema import read_evaluation
        from autoround_modifier.runs.files import check_writable

        if engine == "vllm" and not wants_text:
            typer.echo("not computed with vLLM: divergence and generations", err=True)
        file = _file(output, quantized) if save else None
        if file is not None:
            check_writable(file)
        if file is not None and not replace:
            check_mergeable(read_evaluation(file), original)
        task_settings = None
        if tasks is not None:
            task_settings = TaskSettings(
                tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
                task_path=task_path,
                engine=engine,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                batch_size=batch_size,
                model_args=_typed(arguments),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                results_folder=save_results,
                program=lm_eval,
            )
        found = evaluate_checkpoint(
            resolve_model(original, platform),
            resolve_model(quantized, platform),
            EvaluationSettings(
                divergence=wants_text,
                text=text,
                match=wanted_rows,
                num_samples=samples,
                length=length,
                generations=wants_generations,
                prompts=prompts,
                max_new_tokens=max_new_tokens,
                tasks=task_settings,
                original_results=original_results,
                quantized_results=quantized_results,
                dtype=dtype,
                backend=backend,
                trust_remote_code=trust_remote_code,
            ),
            original_name=original,
            command=quoted_command_line(),
        )
    # Shown first: a disk that is full costs the file, not the results.
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        from autoround_modifier.cli.shown_evaluation import show_evaluation

        show_evaluation(found)
    if file is not None:
        save_evaluation(found, file, replace)
        if not as_json:
            typer.echo(f"written to {file}")


def _file(output: Path | None, quantized: str) -> Path:
    from autoround_modifier.errors import EvaluationError
    from autoround_modifier.report.schema import EVALUATION_FILE

    if output is not None:
        return output
    if not Path(quantized).is_dir():
        raise EvaluationError(
            f"{quantized} is no folder that {EVALUATION_FILE} could be written to: name a file by "
            "`--output`, or give `--no-save`"
        )
    return Path(quantized) / EVALUATION_FILE


def _pairs(items: list[str], flag: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not (name and sign):
            raise UsageError(f"{flag}: `{item}` is no NAME=VALUE")
        pairs[name] = value
    return pairs


def _typed(pairs: dict[str, str]) -> dict[str, Any]:
    """:return: numbers and booleans as such"""
    import yaml

    return {name: yaml.safe_load(value) for name, value in pairs.items()}
