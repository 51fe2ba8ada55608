"""
What each ingredient does on several models and texts, with standard errors.

    make bench-ablation MODELS="path/to/gemma" TEXTS="wiki.jsonl code.jsonl"

SmolLM2-135M is always measured, beside the models that are named. `accuracy.py` runs the methods of
its suite ``ablation`` on each model and text; what it has measured already is kept. Effects are
paired: the same model, text and seed, with and without the change. The standard error is that of
the mean over texts and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from accuracy import SUITES

from autoround_modifier.runs.files import write_atomically

ACCURACY = Path(__file__).parent / "accuracy.py"
SMOLLM2 = "SmolLM2-135M"
Row = Mapping[str, Any]


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
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="beside SmolLM2")
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"), help="folder")
    parser.add_argument("--whole", default=SUITES["ablation"][0], help="what nothing is changed in")
    parser.add_argument("--methods", nargs="+", default=SUITES["ablation"])
    arguments, others = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys([arguments.whole, *arguments.methods]))
    rows: list[Row] = []
    for text in arguments.texts:
        for model in (None, *arguments.models):
            name = SMOLLM2 if model is None else model.name
            results = arguments.output / f"{name}-{text.stem}.json"
            command = [sys.executable, str(ACCURACY), "--text", str(text), "--output", str(results)]
            command += ["--methods", *methods, *others]
            command += [] if model is None else ["--model", str(model)]
            subprocess.run(command, check=True)
            found = json.loads(results.read_text())
            rows += [{"model": name, "text": text.stem, **row} for row in found]
            write_atomically(arguments.output / "ablation.md", table(rows, arguments.whole))
    print(table(rows, arguments.whole))


if __name__ == "__main__":
    main()
