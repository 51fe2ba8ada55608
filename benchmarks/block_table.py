"""What is measured of one block in one format, and the table of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from device_counts import DeviceCounts

__all__ = ["Row", "markdown"]


@dataclass
class Row:
    """
    :ivar format: of the weights
    :ivar store: where samples are kept, ``device`` or ``host``
    :ivar step_ms: one step of tuning
    :ivar floor_ms: forward and backward of the bare block with the same batch
    :ivar masked_floor_ms: the same with the attention mask that was recorded
    :ivar search_s: scale search of all layers of the block, and the first time, with compilation
    :ivar peak_gib: of the device, beyond what was there before tuning; None for a CPU
    :ivar compiled: whether the compiler did not fail
    :ivar counts: of one step
    """

    format: str
    store: str
    step_ms: float
    floor_ms: float
    masked_floor_ms: float
    search_s: float
    first_search_s: float
    peak_gib: float | None
    compiled: bool
    counts: DeviceCounts


def markdown(facts: dict[str, Any], rows: Iterable[Row]) -> str:
    lines = [
        f"{facts['device']}, PyTorch {facts['torch']}. A block of hidden size {facts['hidden']}, "
        f"{facts['samples']} samples of {facts['length']} tokens, "
        f"batches of {facts['batch']}, mean of {facts['steps']} steps.",
        "",
        "| weights | samples kept on | ms per step | floor | of the floor | floor with mask "
        "| kernels ms | launches | copies to the device | MB in them | copies back "
        "| waits | peak GiB | search s | first search s |",
        "| --- " * 15 + "|",
    ]
    for row in rows:
        counts = row.counts
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        lines.append(
            f"| {row.format}{'' if row.compiled else ' (not compiled)'} | {row.store} "
            f"| {row.step_ms:.1f} | {row.floor_ms:.1f} | {row.step_ms / row.floor_ms:.2f} "
            f"| {row.masked_floor_ms:.1f} "
            f"| {counts.kernel_ms:.1f} | {counts.kernels:.0f} | {counts.copies_to_device:.0f} "
            f"| {counts.bytes_to_device / 1e6:.1f} | {counts.copies_from_device:.0f} "
            f"| {counts.waits:.0f} | {peak} | {row.search_s:.2f} | {row.first_search_s:.1f} |"
        )
    return "\n".join(lines) + "\n"
