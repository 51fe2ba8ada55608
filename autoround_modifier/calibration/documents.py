"""What a row of a dataset holds, a text or a conversation, as token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from autoround_modifier.calibration.records import Record, shown
from autoround_modifier.calibration.tokens import first_tokens, last_tokens
from autoround_modifier.errors import CalibrationError

__all__ = ["TEXT_COLUMNS", "Document", "Tokenization", "content_of", "either"]

# Where a text or a conversation is looked for, in this order.
TEXT_COLUMNS = ("text", "messages", "conversations", "content")

# Roles of ShareGPT, which is what `conversations` usually holds.
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
# As Transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def content_of(record: Record, text_column: str | None = None) -> str | list[Any] | None:
    """
    :param record: a row, or a whole text
    :param text_column: column of the text or the messages; None takes the first of `TEXT_COLUMNS`
        that holds something
    :return: a text, or the messages of a conversation; None for null and for an empty text
    :raises CalibrationError: with the place, if the row has no such column, or holds something else
    """
    place, row = record
    if row is None:
        return None
    if isinstance(row, str):
        return row if row.strip() else None
    columns = TEXT_COLUMNS if text_column is None else (text_column,)
    wanted = either(columns)
    if not isinstance(row, Mapping):
        raise CalibrationError(
            f"{place}: {shown(row)} is neither a text nor an object with a field {wanted}"
        )
    there = [column for column in columns if column in row]
    if not there:
        raise CalibrationError(
            f"{place}: no field {wanted}; this row has {sorted(map(str, row))}. Name the right one "
            "with `text_column`."
        )
    column = next((column for column in there if row[column]), there[0])
    content = row[column]
    if content is None or (isinstance(content, str) and not content.strip()):
        return None
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(x, Mapping) for x in content):
        return list(content) or None
    raise CalibrationError(
        f"{place}: field `{column}` is {shown(content)}, neither a text nor a list of messages"
    )


def either(columns: Sequence[str]) -> str:
    """:return: names of columns for a message: `a`, `b` or `c`"""
    *others, last = [f"`{column}`" for column in columns]
    return f"{', '.join(others)} or {last}" if others else last


@dataclass
class Document:
    """
    :param ids: token ids, without the special ones around them
    :param loss_mask: 1 for each id that counts, else 0; None if all count
    :param first: special ids in front of each piece of it
    :param last: special ids at its end, if the tokenizer puts them there
    :param separator: special ids between it and a document that follows in one sample
    """

    ids: list[int]
    loss_mask: list[int] | None
    first: list[int]
    last: list[int]
    separator: list[int]


class Tokenization:
    """
    Makes documents of texts and conversations.

    :param tokenizer: of the model, or the processor that holds it
    :param add_bos_token: whether samples of text begin with BOS; None does what the tokenizer does
    :param assistant_only_loss: whether only what the assistant says in conversations counts
    :raises CalibrationError: if BOS is asked for and the tokenizer has none
    """

    def __init__(
        self, tokenizer: Any, add_bos_token: bool | None = None, assistant_only_loss: bool = False
    ):
        self.tokenizer: PreTrainedTokenizerBase = getattr(tokenizer, "tokenizer", tokenizer)
        self.first = first_tokens(self.tokenizer, add_bos_token)
        self.last = last_tokens(self.tokenizer)
        eos = self.tokenizer.eos_token_id
        self.separator = self.last or ([] if eos is None else [eos])
        self.assistant_only_loss = assistant_only_loss
        # A processor may hold the template that its tokenizer lacks.
        own = getattr(self.tokenizer, "chat_template", None)
        self._template = None if own else getattr(tokenizer, "chat_template", None)

    def __call__(self, content: str | list[Any], record: Record) -> Document:
        """
        :param content: of the record, by `content_of`
        :raises CalibrationError: with the place, for a conversation that the chat template refuses
        """
        if isinstance(content, str):
            encoded = self.tokenizer(content, add_special_tokens=False, verbose=False)
            ids, loss_mask = list(encoded["input_ids"]), None
            last, separator = self.last, self.separator
        else:
            ids, loss_mask = self._conversation(content, record)
            last, separator = [], []  # the template ends it
        # A template writes BOS itself, and so does text that was made with one.
        begins = self.first if isinstance(content, str) or self._begins(ids) else []
        if begins and self._begins(ids):
            ids = ids[len(begins) :]
            loss_mask = None if loss_mask is None else loss_mask[len(begins) :]
        return Document(ids, loss_mask, begins, last, separator)

    def _begins(self, ids: list[int]) -> bool:
        return bool(self.first) and ids[: len(self.first)] == self.first

    def _conversation(
        self, messages: list[Any], record: Record
    ) -> tuple[list[int], list[int] | None]:
        """:return: token ids, and which of them the assistant says, if only those count"""
        place = record.place
        messages = [_message(message, place, number) for number, message in enumerate(messages, 1)]
        tools = _tools(record)
        try:
            template = self.tokenizer.get_chat_template(self._template, tools)
        except NotImplementedError:
            template = ""  # mistral-common writes conversations without one
        except ValueError as error:
            raise CalibrationError(
                f"{place}: the tokenizer has no chat template to write `messages` with. Set "
                "`tokenizer.chat_template`, take the tokenizer of the instruction-tuned model, or "
                "name a column of plain text with `text_column`."
            ) from error
        if self.assistant_only_loss and not _GENERATION.search(template):
            raise CalibrationError(
                "assistant_only_loss: the chat template does not mark what the assistant says with "
                "{% generation %}, so that no token would count. Add the marks to "
                "`tokenizer.chat_template`, or leave `assistant_only_loss` out."
            )
        options: dict[str, Any] = {}
        if self._template is not None:
            options["chat_template"] = self._template
        if self.assistant_only_loss:
            options["return_assistant_tokens_mask"] = True
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                return_dict=True,
                **options,
            )
        except Exception as error:  # templates raise what they like
            raise CalibrationError(
                f"{place}: the chat template refuses the conversation: {error}"
            ) from error
        ids = list(encoded["input_ids"])
        return ids, list(encoded["assistant_masks"]) if self.assistant_only_loss else None


def _message(message: Mapping[str, Any], place: str, number: int) -> dict[str, Any]:
    """:return: the message with ``role`` and ``content``, as chat templates expect it"""
    if "from" in message and "value" in message:
        role = message["from"]
        return {"role": _ROLES.get(role, role), "content": message["value"]}
    if "role" not in message:
        raise CalibrationError(
            f"{place}: message {number} has no `role`; it has {sorted(map(str, message))}"
        )
    content = message.get("content")
    if isinstance(content, list) and any(
        not isinstance(part, Mapping) or part.get("type") != "text" for part in content
    ):
        raise CalibrationError(
            f"{place}: message {number} holds more than text. Make samples with images or sound by "
            "the model's processor, and pass a dataset with `input_ids`."
        )
    # Datasets fill columns that only other messages have with null.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _tools(record: Record) -> list[Any] | None:
    """:return: descriptions of tools that the conversation may call"""
    tools = record.value.get("tools") if isinstance(record.value, Mapping) else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{record.place}: `tools` is not JSON ({error.msg})") from error
    return tools if isinstance(tools, list) and tools else None
