"""The device that is measured: its clock, its memory, its name."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

__all__ = ["Device"]


class Device:
    """
    :param name: of the device, ``cuda:0``; None for the accelerator, or else the CPU
    """

    def __init__(self, name: str | None):
        if name is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            name = "cpu" if accelerator is None else f"{accelerator.type}:0"
        self.device = torch.device(name)
        self.module = torch.get_device_module(self.device)

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def description(self) -> str:
        """:return: the name of the card"""
        return platform.processor() or "CPU" if self.is_cpu else self.module.get_device_name()

    def now(self) -> float:
        """:return: seconds, when all work given so far is done"""
        self.module.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """:return: that the device takes for what ``work`` gives it to do"""
        started = self.now()
        work()
        return self.now() - started

    def peak_reset(self) -> int:
        """:return: bytes in use now, from where `peak` counts on"""
        if self.is_cpu:
            return 0
        self.module.empty_cache()
        self.module.reset_peak_memory_stats()
        return self.module.memory_allocated()

    def peak(self) -> int | None:
        """:return: largest number of bytes in use since `peak_reset`; None for a CPU"""
        return None if self.is_cpu else self.module.max_memory_allocated()
