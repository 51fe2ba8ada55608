"""
Measures the peak memory of tuning a stack of 4 and one of 16 blocks; a program of its own, so that
nothing else counts.

    python memory_run.py FOLDER

Prints one JSON line: for a model in memory and one on the disk (see benchmarks/memory.py), for each
stack, the peak beyond what was resident with the model loaded, less scales and zero points that
stay in memory; and the bytes of one block's outputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from memory import (
    PLACES,
    current_rss,
    load,
    parameter_bytes,
    peak_rss,
    reset_peak,
    save_stack,
    settle,
    tune,
)

BLOCKS = (1, 4, 16)  # the first only so that everything is imported
WIDTH, SAMPLES, LENGTH = 192, 16, 256


def measure(place: str, num_blocks: int, folder: Path) -> int:
    """:return: bytes of the peak beyond the model"""
    model = load(folder / str(num_blocks), place, folder / f"offloaded-{num_blocks}")
    before = parameter_bytes(model)
    settle()
    held = current_rss()
    reset_peak()
    tune(model, SAMPLES, LENGTH, iters=1, scale_search=False)
    added = parameter_bytes(model) - before if place == "memory" else 0
    return peak_rss() - held - added


def main(folder: Path) -> None:
    for num_blocks in BLOCKS:
        save_stack(folder / str(num_blocks), num_blocks, WIDTH)
    result: dict[str, Any] = {"outputs": SAMPLES * LENGTH * WIDTH * 2}
    for place in PLACES:
        _, *result[place] = (measure(place, num_blocks, folder) for num_blocks in BLOCKS)
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
