"""What LLM-Compressor cannot do with a model, in words: its own errors quote generated code."""

from __future__ import annotations

import traceback

__all__ = ["explain_failure"]

_TRACING = "llmcompressor/pipelines/sequential/helpers.py"
_INTERMEDIATES = "llmcompressor/pipelines/cache.py"
_EXPERTS = "llmcompressor/modeling/moe/"


def explain_failure(error: BaseException, model_name: str) -> str | None:
    """
    :param error: raised while LLM-Compressor ran
    :param model_name: for the message
    :return: what it could not do, and what to do instead; None for errors of other origin
    """
    frames = [
        (frame.filename.replace("\\", "/"), frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    reason = _reason(error)
    if any(
        (path.endswith(_TRACING) and name == "trace_subgraphs")
        or name == "append_autowrap_source_on_fail"
        or path.endswith(_INTERMEDIATES)
        for path, name in frames
    ) or _in_generated_code(frames):
        return (
            f"LLM-Compressor's sequential pipeline cannot run {model_name} block by block "
            f'({reason}). Pass `pipeline="basic"`, which runs the whole model at once and keeps '
            "the inputs and outputs of all blocks in memory."
        )
    if any(_EXPERTS in path and not name.startswith("forward") for path, name in frames):
        return (
            f"LLM-Compressor cannot separate the experts of {model_name} into linear layers "
            f"({reason}). It knows other mixtures; a later release of it may know this one."
        )
    return None


def _in_generated_code(frames: list[tuple[str, str]]) -> bool:
    """:return: whether the error was raised by code that the pipeline made of the model's"""
    return frames[-1:] == [("<string>", "forward")] and any(
        path.endswith(_TRACING) for path, _ in frames
    )


def _reason(error: BaseException) -> str:
    """:return: type and first line of the error that came first"""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
