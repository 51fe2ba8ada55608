"""Calibration samples from conversations, written with a chat template."""

from __future__ import annotations

import pytest
from conftest import tiny_llama, tiny_tokenizer, weight_scheme
from datasets import Dataset

from autoround_modifier import AutoRoundModifier, oneshot, text_dataset
from autoround_modifier.errors import CalibrationError

PLAIN = (
    "{% for m in messages %}{{ 'w3 ' if m['role'] == 'user' else 'w4 ' }}"
    "{{ m['content'] }} <eos> {% endfor %}"
)
# As PLAIN, with BOS in front, and with marks around what the assistant says.
MARKED = (
    "<pad> {% for m in messages %}{% if m['role'] == 'assistant' %}w4 "
    "{% generation %}{{ m['content'] }} <eos> {% endgeneration %}"
    "{% else %}w3 {{ m['content'] }} <eos> {% endif %}{% endfor %}"
)


def tokenizer_of(template: str | None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def turns(*texts: str) -> list[dict]:
    return [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]


SHORT = turns("w10 w11", "w20")
IDS = [3, 10, 11, 1, 4, 20, 1]


def sharegpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[x["role"]], "value": x["content"]} for x in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SHORT},
        {"conversations": sharegpt(SHORT)},
        {"content": SHORT},
        {"text": None, "messages": SHORT},
        {"messages": [{"role": x["role"], "content": x["content"], "name": None} for x in SHORT]},
    ],
    ids=["messages", "conversations", "content", "text is null", "null keys"],
)
def test_conversations_are_written_with_the_template(row):
    samples = text_dataset([row] * 2, tokenizer_of(PLAIN), 10, 7)
    assert samples["input_ids"] == [IDS, IDS]  # without EOS of ours
    assert "loss_mask" not in samples.column_names


def test_text_column_may_hold_messages():
    data = Dataset.from_dict({"dialog": [SHORT], "text": ["w99 w99"]})
    samples = text_dataset(data, tokenizer_of(PLAIN), 10, 7, text_column="dialog")
    assert samples["input_ids"] == [IDS]


def test_oneshot_takes_messages():
    recipe = AutoRoundModifier(iters=1, batch_size=2, config_groups={"group_0": weight_scheme(4)})
    data = Dataset.from_dict({"messages": [turns("w10 " * 8, "w20 " * 8)] * 4})
    oneshot(
        model=tiny_llama(),
        recipe=recipe,
        dataset=data,
        tokenizer=tokenizer_of(PLAIN),
        max_seq_length=16,
    )
    assert len(recipe.block_reports) == 2


def test_the_processor_may_hold_the_template():
    class Processor:
        tokenizer = tokenizer_of(None)
        chat_template = PLAIN

    assert text_dataset([{"messages": SHORT}], Processor(), 10, 7)["input_ids"] == [IDS]


def test_tools_reach_the_template():
    template = "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}" + PLAIN
    for tools in ([{"name": "w50"}], '[{"name": "w50"}]'):
        row = {"messages": SHORT, "tools": tools}
        samples = text_dataset([row], tokenizer_of(template), 10, 8)
        assert samples["input_ids"] == [[50, *IDS]]


def test_a_template_begins_with_bos_or_does_not():
    """Once if the template has it, not at all if only the tokenizer has it for plain text."""
    from test_text import tokenizer_with_bos

    tokenizer = tokenizer_with_bos()
    tokenizer.chat_template = MARKED
    long = [{"messages": turns("w10 w11", "w20 w21 w22 w23 w24")}]
    samples = text_dataset(long, tokenizer, 10, 7)["input_ids"]
    assert samples == [[0, 3, 10, 11, 1, 4, 20], [0, 21, 22, 23, 24, 1]]
    tokenizer.chat_template = PLAIN
    assert text_dataset(long, tokenizer, 10, 7)["input_ids"] == [
        [3, 10, 11, 1, 4, 20, 21],
        [22, 23, 24, 1],
    ]


def test_only_what_the_assistant_says_counts():
    rows = [{"messages": SHORT}, {"messages": turns("w12", "w21 w22")}]
    samples = text_dataset(rows, tokenizer_of(MARKED), 10, 8, assistant_only_loss=True)
    assert samples["input_ids"] == [[0, *IDS], [0, 3, 12, 1, 4, 21, 22, 1]]
    assert samples["loss_mask"] == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    joined = text_dataset(rows, tokenizer_of(MARKED), 10, 16, assistant_only_loss=True)
    assert joined["loss_mask"] == [samples["loss_mask"][0] + samples["loss_mask"][1]]


def test_pieces_in_which_the_assistant_says_nothing_are_left_out(log):
    rows = [{"messages": turns("w10 " * 12, "w20 w21 w22 w23")}]
    arguments = {"num_samples": 10, "max_seq_length": 8, "assistant_only_loss": True}
    samples = text_dataset(rows, tokenizer_of(MARKED), **arguments)
    assert samples["loss_mask"] == [[1] * 5]
    assert "2 samples in which the assistant says nothing" in log[-1]
    with pytest.raises(CalibrationError, match="assistant says nothing in 1 conversations"):
        text_dataset([{"messages": turns("w10 " * 12)}], tokenizer_of(MARKED), **arguments)


def test_assistant_only_loss_reaches_the_tuner(monkeypatch):
    """Tokens of the user have no influence on the importance of input channels."""
    from autoround_modifier.blocks.importance import Importance

    counted = []
    original = Importance.record

    def record(self, layer, x, mask=None):
        counted.append(None if mask is None else int(mask.sum()))
        original(self, layer, x, mask)

    monkeypatch.setattr(Importance, "record", record)
    oneshot(
        model=tiny_llama(),
        recipe=AutoRoundModifier(
            preset="opt_rtn", ignore=["lm_head"], config_groups={"group_0": weight_scheme(4)}
        ),
        dataset=[{"messages": SHORT}],
        tokenizer=tokenizer_of(MARKED),
        max_seq_length=8,
        assistant_only_loss=True,
    )
    assert counted
    assert set(counted) == {2}


def test_a_template_without_generation_is_refused():
    with pytest.raises(CalibrationError, match=r"\{% generation %\}"):
        text_dataset([{"messages": SHORT}], tokenizer_of(PLAIN), 9, 8, assistant_only_loss=True)


def test_text_has_no_assistant():
    with pytest.raises(CalibrationError, match="texts, not conversations"):
        text_dataset(["w3 " * 8], tokenizer_of(MARKED), 9, 8, assistant_only_loss=True)


REFUSING = "{{ raise_exception('no system role') }}"


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (None, SHORT, "row 1: the tokenizer has no chat template"),
        (REFUSING, SHORT, "row 1: the chat template refuses the conversation: no system role"),
        (PLAIN, [{"content": "w3"}], r"row 1: message 1 has no `role`; it has \['content'\]"),
        (
            PLAIN,
            [*SHORT, {"role": "user", "content": [{"type": "image"}]}],
            "message 3 holds more than text",
        ),
    ],
    ids=["no template", "refused by the template", "no role", "image"],
)
def test_conversations_that_cannot_be_written(template, messages, problem):
    with pytest.raises(CalibrationError, match=problem):
        text_dataset([{"messages": messages}], tokenizer_of(template), 9, 8)


def test_empty_conversations_are_skipped(log):
    rows = [{"messages": []}, {"messages": None}, {"messages": SHORT}]
    assert text_dataset(rows, tokenizer_of(PLAIN), 9, 7)["input_ids"] == [IDS]
    assert "2 rows without text" in log[-1]
