"""
Divergence over the time that quantizing takes, on several models and texts, beside the peers.

    make bench-curves BOS_MODELS="path/to/gemma" TEXTS="wiki.jsonl code.jsonl"

SmolLM2-135M is always measured, beside the models that are named. A budget of 1 is 50 steps of four
samples of 256 tokens for each block, on 64 samples; larger ones are multiples of that. With the
budget grow the calibration samples, for everyone alike; scale distillation alone reads more, and
what it needs is in its seconds. `accuracy.py` measures each row; what it has measured already is
kept.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from accuracy import FIGURES, figures
from several import add_arguments, measured, model_name, models_of

from autoround_modifier.runs.files import write_atomically

# budget -> samples that blocks are tuned on
SAMPLES = {1: 64, 4: 128, 16: 512, 64: 1024}
STEPS = 50
# budget -> steps of each block, steps of scale distillation after them, and samples of those. They
# are about as many passes through the model as auto-round makes; at 1 half as many more
END_TO_END = {1: (50, 30, 256), 4: (120, 60, 256), 16: (480, 240, 1024), 64: (1920, 960, 1024)}
BATCH_SIZE = 4


@dataclass(frozen=True)
class Method:
    """
    :param name: in table and plot
    :param options: of `accuracy.py`'s method; the names in braces are those of `at`
    :param end_to_end: whether scale distillation follows
    """

    name: str
    options: str
    end_to_end: bool = False

    def at(self, budget: int) -> tuple[str, int]:
        """:return: method and number of samples for `accuracy.py`"""
        steps, samples, distillation, text = STEPS * budget, SAMPLES[budget], 0, 0
        if self.end_to_end:
            steps, distillation, text = END_TO_END[budget]
        options = self.options.format(
            steps=steps, samples=samples, end_to_end=distillation, text=text
        )
        return options, max(samples, text)


METHODS = {
    method.name: method
    for method in (
        Method("block by block", "default+iters={steps}+num_calibration_samples={samples}"),
        Method(
            "then end to end",
            "default+iters={steps}+num_calibration_samples={samples}"
            "+distillation.iters={end_to_end}"
            "+distillation.num_calibration_samples={text}+distillation.position_fraction=0.5"
            "+distillation.gradient_checkpointing=false",
            end_to_end=True,
        ),
        Method("auto-round with alg_ext", "auto-round+iters={steps}+enable_alg_ext=true"),
        Method("GSQ", "gsq+steps={steps}"),
    )
}


def table(rows: list[dict[str, Any]]) -> str:
    """:return: Markdown: one line for each model, text, scheme, budget and method"""
    lines = [f"| model | text | scheme | budget | method | {FIGURES} |", "| --- " * 12 + "|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["model"], row["text"], row["scheme"], row["budget"], row["name"])
        groups.setdefault(key, []).append(row)
    for (model, text, scheme, budget, name), runs in sorted(groups.items()):
        lines.append(f"| {model} | {text} | {scheme} | {budget}x | {name} | {figures(runs)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """
    :param rows: of one scheme
    :param path: where to save; its ending says how (``.png``, ``.svg``, ``.pdf``)
    """
    from matplotlib.figure import Figure

    panels = sorted({(row["model"], row["text"]) for row in rows})
    figure = Figure(figsize=(5.0 * len(panels), 4.0), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in METHODS:
            points: dict[int, list[tuple[float, float]]] = {}
            for row in rows:
                if (row["model"], row["text"], row["name"]) == (*panel, name):
                    points.setdefault(row["budget"], []).append((row["seconds"], row["kl"]))
            if points:
                means = [[mean(x) for x in zip(*points[b], strict=True)] for b in sorted(points)]
                axes.plot(*zip(*means, strict=True), "o-", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("seconds")
        axes.set_ylabel("KL divergence on held-out text")
        axes.set_title(", ".join(panel))
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--schemes", nargs="+", default=["w2"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[1, 4], choices=SAMPLES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--output", type=Path, default=Path("output/curves"), help="folder")
    parser.add_argument("--plot", type=Path, help="where to save a picture of the first scheme")
    arguments, others = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    # Budget by budget, so that a run that is cut short has all methods of the small ones.
    for budget in arguments.budgets:
        for text in arguments.texts:
            for model in models_of(arguments):
                for name in arguments.methods:
                    options, samples = METHODS[name].at(budget)
                    key = f"{model_name(model)}-{text.stem}-{budget}x-{name.replace(' ', '-')}"
                    more = ["--samples", str(samples), "--length", "256"]
                    more += ["--batch-size", str(BATCH_SIZE), "--schemes", *arguments.schemes]
                    results = arguments.output / f"{key}.json"
                    found = measured(arguments, model, text, results, [options], [*more, *others])
                    rows += [{**row, "budget": budget, "name": name} for row in found]
                    write_atomically(arguments.output / "curves.md", table(rows))
    print(table(rows))
    if arguments.plot:
        plot([row for row in rows if row["scheme"] == arguments.schemes[0]], arguments.plot)


if __name__ == "__main__":
    main()
