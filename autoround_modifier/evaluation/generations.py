"""What a model writes after a prompt, always taking its first choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from autoround_modifier.errors import EvaluationError

__all__ = ["PROMPTS", "Prompt", "generate", "prompt_text", "read_prompts"]

# A text to go on from, or the messages of a conversation
Prompt = str | list[dict[str, Any]]

PROMPTS: tuple[Prompt, ...] = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 14:35 and arrives at 17:10. How long is the journey?",
    "Translate into French: The library opens at nine in the morning.",
)


def read_prompts(path: Path | None) -> tuple[Prompt, ...]:
    """
    :param path: plain text with a prompt in each line, or JSON lines with ``prompt`` or
        ``messages``; None for `PROMPTS`
    :raises EvaluationError: with file and line, if it holds something else, or nothing
    """
    if path is None:
        return PROMPTS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text, so no prompts: {error}") from error
    as_json = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts = tuple(
        _parsed(line, f"{path}:{number}") if as_json else line
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not prompts:
        raise EvaluationError(f"{path} holds no prompt")
    return prompts


def prompt_text(prompt: Prompt) -> str:
    """:return: the prompt for a reader; of a conversation, with who says what"""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> list[str]:
    """
    :param prompts: put into the tokenizer's chat template if it has one
    :param max_new_tokens: in each continuation
    :return: the continuations, without special tokens
    :raises EvaluationError: if a prompt is a conversation and there is no chat template
    """
    padding = tokenizer.pad_token_id
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([_prompt_ids(tokenizer, prompt)], device=model.device)
        generated = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.eos_token_id if padding is None else padding,
        )
        new = generated[0, ids.shape[1] :]
        continuations.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return continuations


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    raise EvaluationError(
        "a prompt is a conversation, and the tokenizer has no chat template: give the prompt as "
        "a text"
    )


def _parsed(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{place}: no JSON: {error}") from error
    row = row if isinstance(row, dict) else {}
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise EvaluationError(
        f"{place}: there is neither a text in `prompt`, nor a list of objects with `role` and "
        "`content` in `messages`"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= set(message)
