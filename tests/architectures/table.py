"""Writes the table of architectures, from the checks that the tests make."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from catalogue import CATALOGUE, Architecture
from checks import Outcome, check
from llmcompressor.core import reset_session

CHECKS = [field.name for field in fields(Outcome)]


def row(architecture: Architecture) -> list[str]:
    """:return: the cells of one row; why a check failed is in the last"""
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = check(architecture, Path(folder))
        finally:
            reset_session()
    problems = [getattr(outcome, name) for name in CHECKS]
    marks = ["no" if problem else "yes" for problem in problems]
    notes = [text for text in (architecture.note, *problems) if text]
    return [architecture.name, architecture.family, *marks, "; ".join(notes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="Markdown file")
    output = parser.parse_args().output
    header = ["architecture", "family", *CHECKS, "note"]
    rows = [header, ["---"] * len(header), *map(row, CATALOGUE)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(f"| {' | '.join(cells)} |\n" for cells in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
