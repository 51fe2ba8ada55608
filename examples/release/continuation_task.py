"""
A task of multiple choice for lm-evaluation-harness, made of any text: which of four passages goes
on after a beginning? Three of them are from other documents. It needs no download.

    python examples/release/continuation_task.py held-out.jsonl tasks --match split=eval
    autoround-modifier evaluate MODEL CHECKPOINT --tasks continuations --task-path tasks
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

TASK = "continuations"
CHOICES = 4
BEGINNING, CONTINUATION = 60, 20  # words


def questions(documents: list[str], seed: int = 0) -> list[dict]:
    """
    :param documents: texts; those with too few words are left out
    :return: one question for each passage of `BEGINNING` and `CONTINUATION` words
    :raises ValueError: if there are too few documents to choose from
    """
    size = BEGINNING + CONTINUATION
    passages = []
    for number, text in enumerate(documents):
        words = text.split()
        for start in range(0, len(words) - size + 1, size):
            passage = words[start : start + size]
            passages.append((number, passage[:BEGINNING], passage[BEGINNING:]))
    if len({number for number, _, _ in passages}) < CHOICES:
        raise ValueError(f"fewer than {CHOICES} documents have {size} words")
    rng = random.Random(seed)
    found = []
    for number, beginning, right in passages:
        wrong = [words for other, _, words in passages if other != number]
        choices = [right, *rng.sample(wrong, CHOICES - 1)]
        rng.shuffle(choices)
        found.append(
            {
                "beginning": " ".join(beginning),
                "choices": [" ".join(words) for words in choices],
                "answer": choices.index(right),
            }
        )
    return found


def write_task(rows: list[dict], folder: Path) -> None:
    """Write the questions and the task's YAML file, which names them by their full path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{TASK}.jsonl").resolve()
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(
        f"task: {TASK}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{beginning}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\n"
        "metric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "metadata: {version: 1.0}\n",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("text", type=Path, help="JSON lines with a field `text`")
    parser.add_argument("folder", type=Path, help="to write the task to")
    parser.add_argument("--match", metavar="FIELD=VALUE", help="use only such rows")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.text.read_text(encoding="utf-8").splitlines()]
    if arguments.match:
        field, _, value = arguments.match.partition("=")
        rows = [row for row in rows if str(row.get(field)) == value]
    found = questions([row["text"] for row in rows])
    write_task(found, arguments.folder)
    print(f"{len(found)} questions in {arguments.folder}")


if __name__ == "__main__":
    main()
