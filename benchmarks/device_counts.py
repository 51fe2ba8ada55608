"""Counts what a program does on an accelerator: kernels, copies, waits. From a profiler trace."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["DeviceCounts", "DeviceProfile", "count_events"]

WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
LONGEST = 12  # kernels that are listed by name


@dataclass
class DeviceCounts:
    """
    Per step.

    :ivar kernels: launches
    :ivar kernel_ms: time in which kernels ran
    :ivar copies_to_device: from the host
    :ivar bytes_to_device: in them
    :ivar copies_from_device: to the host
    :ivar waits: calls in which the host waited for the device
    :ivar longest: (name, launches, milliseconds) of the kernels that took most time together
    """

    kernels: float = 0
    kernel_ms: float = 0
    copies_to_device: float = 0
    bytes_to_device: float = 0
    copies_from_device: float = 0
    waits: float = 0
    longest: list[tuple[str, float, float]] = field(default_factory=list)


def count_events(events: list[dict[str, Any]], steps: int) -> DeviceCounts:
    """
    :param events: ``traceEvents`` of a trace that `torch.profiler` exports
    :param steps: that were recorded
    """
    counts = DeviceCounts()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for event in events:
        if event.get("ph") != "X":
            continue
        name, category = event["name"], event.get("cat", "").lower()
        if category == "kernel":
            counts.kernels += 1
            counts.kernel_ms += event["dur"] / 1e3
            kernels[name][0] += 1
            kernels[name][1] += event["dur"] / 1e3
        elif category == "gpu_memcpy" and "HtoD" in name:
            counts.copies_to_device += 1
            counts.bytes_to_device += event.get("args", {}).get("bytes", 0)
        elif category == "gpu_memcpy" and "DtoH" in name:
            counts.copies_from_device += 1
        elif category.endswith("_runtime") and name.endswith(WAITS):
            counts.waits += 1
    for name in (
        "kernels",
        "kernel_ms",
        "copies_to_device",
        "bytes_to_device",
        "copies_from_device",
        "waits",
    ):
        setattr(counts, name, getattr(counts, name) / steps)
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:LONGEST]
    counts.longest = [(name, n / steps, ms / steps) for name, (n, ms) in longest]
    return counts


class DeviceProfile:
    """
    Records what runs between `start` and `stop`.

    :param device: an accelerator; of a CPU nothing is counted
    """

    def __init__(self, device: torch.device):
        activity = {
            "cuda": torch.profiler.ProfilerActivity.CUDA,
            "xpu": torch.profiler.ProfilerActivity.XPU,
        }.get(device.type, torch.profiler.ProfilerActivity.CPU)
        self._profile = torch.profiler.profile(activities=[activity])

    def start(self) -> None:
        self._profile.start()

    def stop(self, steps: int) -> DeviceCounts:
        """
        Called when the device has finished what it was given.

        :param steps: since `start`
        """
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return count_events(events, steps)
