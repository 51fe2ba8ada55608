"""Numbers as people read them: sizes, counts, durations, shares."""

from __future__ import annotations

import re

__all__ = [
    "bits_text",
    "bytes_text",
    "count_text",
    "duration_text",
    "figures_text",
    "percent_text",
    "unbroken",
]

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def bytes_text(size: float) -> str:
    """:return: with three figures and a decimal unit, such as ``86.6 MB`` or ``1.31 GB``"""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{_three_figures(value) if unit else round(value)} {_UNITS[unit]}"


def count_text(number: float) -> str:
    """:return: with three figures, such as ``135 M`` or ``12.5 k``; small numbers as they are"""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{_three_figures(number / limit)} {unit}"
    return f"{number:g}"


def _three_figures(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def duration_text(seconds: float) -> str:
    """:return: such as ``0.4 s``, ``45 s``, ``3 min 32 s``, ``12 min`` or ``3 h 20 min``"""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def percent_text(share: float, digits: int = 1) -> str:
    """:param share: 1 is all"""
    return f"{100 * share:.{digits}f} %"


def bits_text(bits: float) -> str:
    """:return: with at most two decimals"""
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def figures_text(value: float, figures: int = 3) -> str:
    """:return: with so many figures; with an exponent where it is below 0.001 or large"""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, exponent = f"{value:.{figures - 1}e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:#.{figures}g}".rstrip(".") if abs(value) < 10**figures else f"{value:.0f}"


def unbroken(text: str) -> str:
    """:return: the same without line breaks between numbers and their units"""
    return re.sub(r"(?<=\d) (?=(?:%|[kMGT]?B|bytes|min|[hs]|bits)\b|%)", "\u00a0", text)
