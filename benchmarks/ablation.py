"""
What each ingredient does on several models and texts, with standard errors.

    make bench-ablation BOS_MODELS="path/to/gemma" TEXTS="wiki.jsonl code.jsonl"

SmolLM2-135M is always measured, beside the models that are named. `accuracy.py` runs the methods of
its suite ``ablation`` on each model and text; what it has measured already is kept. Effects are
paired: the same model, text and seed, with and without the change. The standard error is that of
the mean over texts and seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from accuracy import SUITES
from several import Row, add_arguments, measured, model_name, models_of

from autoround_modifier.runs.files import write_atomically


def effects(rows: Iterable[Row], whole: str) -> dict[tuple[str, str, str], list[float]]:
    """
    :param rows: of `accuracy.py`, each with ``model`` and ``text``
    :param whole: the method that nothing is changed in
    :return: model, scheme, other method -> of each text and seed the logarithm of the KL
        divergence as a part of that of ``whole``
    """
    known = {
        (row["model"], row["scheme"], row["text"], row["seed"], row["method"]): math.log(row["kl"])
        for row in rows
    }
    found: dict[tuple[str, str, str], list[float]] = {}
    for (model, scheme, text, seed, method), value in known.items():
        before = known.get((model, scheme, text, seed, whole))
        if method != whole and before is not None:
            found.setdefault((model, scheme, method), []).append(value - before)
    return found


def said(values: list[float]) -> str:
    """:return: such as ``+4.1% ± 1.2``: mean and standard error; without it where there is one"""
    text = f"{100 * math.expm1(mean(values)):+.1f}%"
    if len(values) > 1:
        error = stdev(values) / math.sqrt(len(values))
        text += f" ± {100 * math.exp(mean(values)) * error:.1f}"
    return text


def table(rows: list[Row], whole: str) -> str:
    """:return: Markdown: a line for each scheme and change, a column for each model"""
    found = effects(rows, whole)
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        f"| scheme | changed from `{whole}` | {' | '.join(models)} |",
        "| --- " * (2 + len(models)) + "|",
    ]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        of_whole = [
            [
                row["kl"]
                for row in rows
                if (row["model"], row["scheme"], row["method"]) == (model, scheme, whole)
            ]
            for model in models
        ]
        if all(of_whole):
            cells = " | ".join(f"KL {mean(kls):.3f}" for kls in of_whole)
            lines.append(f"| {scheme} | nothing | {cells} |")
        for method in dict.fromkeys(row["method"] for row in rows if row["method"] != whole):
            values = [found.get((model, scheme, method)) for model in models]
            if any(values):
                cells = " | ".join(said(x) if x else "" for x in values)
                change = method.removeprefix(f"{whole}+")
                lines.append(f"| {scheme} | `{change}` | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"), help="folder")
    parser.add_argument("--whole", default=SUITES["ablation"][0], help="what nothing is changed in")
    parser.add_argument("--methods", nargs="+", default=SUITES["ablation"])
    arguments, others = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys([arguments.whole, *arguments.methods]))
    rows: list[Row] = []
    for text in arguments.texts:
        for model in models_of(arguments):
            results = arguments.output / f"{model_name(model)}-{text.stem}.json"
            rows += measured(arguments, model, text, results, methods, others)
            write_atomically(arguments.output / "ablation.md", table(rows, arguments.whole))
    print(table(rows, arguments.whole))


if __name__ == "__main__":
    main()
