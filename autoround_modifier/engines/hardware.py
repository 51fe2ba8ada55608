"""Hardware that engines run on, and its names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "CPU",
    "DEVICES",
    "ELSEWHERE",
    "METAL",
    "ROCM",
    "XPU",
    "Hardware",
    "Where",
    "cuda",
    "device_named",
    "in_words",
]


@dataclass(frozen=True)
class Hardware:
    """
    :param platform: ``cuda``, ``rocm``, ``xpu``, ``metal`` or ``cpu``
    :param capability: compute capability of an NVIDIA GPU, times ten; 0 on other platforms
    """

    platform: str
    capability: int = 0

    def __str__(self) -> str:
        names = {"rocm": "AMD GPU", "xpu": "Intel GPU", "metal": "Apple GPU", "cpu": "CPU"}
        if self.platform != "cuda":
            return names.get(self.platform, self.platform)
        return f"NVIDIA {self.capability // 10}.{self.capability % 10}"


# What can be asked for by name: Turing, Ampere, Ada, Hopper, both kinds of Blackwell, and others
DEVICES: dict[str, Hardware] = {
    **{f"sm{x}": Hardware("cuda", x) for x in (75, 80, 89, 90, 100, 120)},
    **{name: Hardware(name) for name in ("rocm", "xpu", "metal", "cpu")},
}
ELSEWHERE = tuple(DEVICES.values())


def device_named(name: str) -> Hardware:
    """
    :param name: of `DEVICES`, or ``sm`` and another compute capability, such as ``sm86``
    :raises ValueError: if it is none
    """
    plain = name.strip().lower()
    if plain in DEVICES:
        return DEVICES[plain]
    capability = re.fullmatch(r"sm_?(\d{2,3})a?", plain)
    if capability is not None:
        return Hardware("cuda", int(capability[1]))
    close = difflib.get_close_matches(plain, DEVICES, 1)
    raise ValueError(
        f"`{name}` is no device; use one of {', '.join(DEVICES)}"
        + (f". Did you mean {close[0]}?" if close else "")
    )


@dataclass(frozen=True)
class Where:
    """
    Hardware for which a row of a table holds.

    :param platform: of `Hardware`
    :param minimum: lowest compute capability on ``cuda``
    :param maximum: highest one
    """

    platform: str
    minimum: int = 0
    maximum: int = 999

    def holds(self, hardware: Hardware) -> bool:
        return self.platform == hardware.platform and (
            self.platform != "cuda" or self.minimum <= hardware.capability <= self.maximum
        )

    def __str__(self) -> str:
        """Such as ``NVIDIA 7.5+``, ``NVIDIA 9.0`` or ``NVIDIA 7.5 to 8.9``."""
        if self.platform != "cuda":
            return str(Hardware(self.platform))
        least = str(Hardware("cuda", self.minimum))
        most = f"{self.maximum // 10}.{self.maximum % 10}"
        if self.maximum == 999:
            return "NVIDIA" if self.minimum == 0 else f"{least}+"
        if self.minimum == 0:
            return f"NVIDIA up to {most}"
        return least if self.minimum == self.maximum else f"{least} to {most}"


def cuda(minimum: int, maximum: int = 999) -> Where:
    """:return: NVIDIA GPUs from one compute capability to another, times ten"""
    return Where("cuda", minimum, maximum)


ROCM, XPU, METAL, CPU = Where("rocm"), Where("xpu"), Where("metal"), Where("cpu")


def in_words(hardware: Iterable[Hardware]) -> str:
    """:return: such as ``NVIDIA 7.5+, CPU``; ``+`` where all newer GPUs that are known follow"""
    found = list(hardware)
    gpus = [one.capability for one in found if one.platform == "cuda"]
    known = [one.capability for one in ELSEWHERE if one.platform == "cuda"]
    names = [str(one) for one in found if one.platform == "cuda"]
    if len(gpus) > 1 and gpus == [x for x in known if x >= gpus[0]]:
        names = [f"{names[0]}+"]
    numbers = [name.removeprefix("NVIDIA ") for name in names]
    others = [str(one) for one in found if one.platform != "cuda"]
    return ", ".join(([f"NVIDIA {', '.join(numbers)}"] if numbers else []) + others)
