"""Pictures of a choice: bits along the model, and what other budgets would give."""

from __future__ import annotations

from pathlib import Path

from autoround_modifier.schemes.measurement import Choice

__all__ = ["plot_choice"]


def plot_choice(choice: Choice, path: Path) -> None:
    """
    :param path: where to save; its ending says how (``.png``, ``.svg``, ``.pdf``)
    :raises ImportError: if matplotlib is not installed (``pip install autoround-modifier[plot]``)
    """
    from matplotlib.figure import Figure

    measured = choice.measurement
    bits = [unit.bits[name] / unit.num_weights for unit, name in choice.pairs]
    figure = Figure(figsize=(max(8.0, len(bits) / 12), 7.0), layout="constrained")
    by_layer, by_budget = figure.subplots(2, 1)

    for name in measured.schemes:
        chosen = [index for index, scheme in enumerate(choice.schemes) if scheme == name]
        by_layer.bar(chosen, [bits[index] for index in chosen], width=0.9, label=name)
    step = max(1, len(bits) // 30)
    by_layer.set_xticks(
        range(0, len(bits), step),
        [unit.name for unit in measured.units[::step]],
        rotation=90,
        fontsize=6,
    )
    by_layer.set_ylabel("bits per weight, as saved")
    by_layer.legend()

    averages, scores = zip(*measured.frontier(), strict=True)
    by_budget.plot(averages, scores, label="best choices")
    by_budget.plot([choice.avg_bits()], [choice.score], "o", label="this choice")
    by_budget.set_yscale("log" if min(scores) > 0 else "linear")
    by_budget.set_xlabel("mean bits per weight, as saved")
    by_budget.set_ylabel(f"sum of scores ({measured.score})")
    by_budget.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
