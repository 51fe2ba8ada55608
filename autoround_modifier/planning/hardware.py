"""What a run has: memory and speed of devices, memory and disk of the machine."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from autoround_modifier.engines.environment import this_environment
from autoround_modifier.engines.hardware import Hardware
from autoround_modifier.planning.quantities import Kind

__all__ = ["DEVICES", "Device", "Machine", "find_device", "find_machine", "parse_size"]

GIB = 2**30
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# Host memory for which speed is given per byte: copies between host and device as calibration
# makes them, from memory that is not pinned (docs/benchmarks/gpu.md, 344 MB in 37 ms)
COPIES = 9.3e9


@dataclass(frozen=True)
class Device:
    """
    :ivar name: of the card, or ``cpu``
    :ivar memory: bytes; None for a CPU, which uses the host's
    :ivar flops: of matrix products in 16 bits, at most, per second; None if not known
    :ivar bandwidth: of its memory, bytes per second
    :ivar kind: how ``flops`` is known
    :ivar hardware: what engines choose kernels by; None if it is not known
    """

    name: str
    memory: float | None
    flops: float | None
    bandwidth: float
    kind: Kind = "assumed"
    hardware: Hardware | None = None

    @property
    def is_cpu(self) -> bool:
        return self.memory is None


def _card(name: str, gib: float, teraflops: float, terabytes: float, capability: int) -> Device:
    """:param capability: compute capability, times ten"""
    hardware = Hardware("cuda", capability)
    return Device(name, gib * GIB, teraflops * 1e12, terabytes * 1e12, hardware=hardware)


# GiB that PyTorch reports; dense BF16 TFLOP/s and TB/s of the data sheets; compute capability
DEVICES = {
    device.name: device
    for device in (
        _card("b200", 178, 2250, 8.0, 100),
        _card("h200", 139, 989, 4.8, 90),
        _card("h100", 79, 989, 3.35, 90),
        _card("a100", 79, 312, 2.0, 80),
        _card("a100-40gb", 39.4, 312, 1.55, 80),
        _card("l40s", 44.4, 362, 0.86, 89),
        _card("a6000", 47.4, 155, 0.77, 86),
        _card("l4", 22, 121, 0.3, 89),
        _card("a10g", 22, 70, 0.6, 86),
        _card("t4", 14.6, 65, 0.32, 75),
        _card("rtx5090", 31.3, 210, 1.79, 120),
        _card("rtx4090", 23.5, 165, 1.01, 89),
        _card("rtx3090", 23.6, 71, 0.94, 86),
    )
}
_OTHER_NAMES = {
    "h100-80gb": "h100",
    "h200-141gb": "h200",
    "a100-80gb": "a100",
    "4090": "rtx4090",
    "5090": "rtx5090",
    "3090": "rtx3090",
}
CPU = Device("cpu", None, None, 20e9, hardware=Hardware("cpu"))


@dataclass(frozen=True)
class Machine:
    """
    :ivar device: on which blocks run
    :ivar ram: bytes of host memory
    :ivar disk: free bytes where files go
    :ivar disk_path: of which
    """

    device: Device
    ram: float
    disk: float
    disk_path: str


def parse_size(text: str) -> float:
    """
    :param text: ``24GB``, ``64 GiB``; without a unit GB
    :return: bytes
    :raises ValueError: if it is no size
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b?)?", text.strip().lower())
    if match is None:
        raise ValueError(f"`{text}` is no size; write one like 24GB or 24GiB")
    unit = match[2] or "gb"
    size = float(match[1]) * UNITS[unit if unit.endswith("b") else f"{unit}b"]
    if size <= 0:
        raise ValueError(f"`{text}`: a size is more than 0")
    return size


def find_device(name: str | None = None) -> Device:
    """
    :param name: of a card in `DEVICES`, the size of its memory such as ``24GB``, or ``cpu``; None
        for the device of this machine
    :raises ValueError: if there is no such card
    """
    if name is None:
        return _own_device()
    plain = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-")
    plain = _OTHER_NAMES.get(plain, plain)
    if plain == "cpu":
        return replace(CPU, flops=_measured_cpu_flops(), kind="measured")
    if plain in DEVICES:
        return DEVICES[plain]
    try:
        memory = parse_size(name)
    except ValueError:
        raise ValueError(
            f"`{name}` is no known device; name one of {', '.join(DEVICES)}, cpu, or the size of "
            "its memory, such as 24GB"
        ) from None
    return Device(name, memory, None, 0.0)


def _own_device() -> Device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return find_device("cpu")
    hardware = this_environment().hardware
    if accelerator.type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator)
        words = set(re.findall(r"[a-z]+\d+\w?|\d{4}", properties.name.lower()))
        known = [x for x in DEVICES if x in words or x.removeprefix("rtx") in words]
        speed = DEVICES[known[0]] if known else Device("", 0.0, None, 0.0)
        memory = float(properties.total_memory)
        return replace(speed, name=properties.name, memory=memory, hardware=hardware)
    module = torch.get_device_module(accelerator)
    memory = float(module.get_device_properties(accelerator).total_memory)
    return Device(accelerator.type, memory, None, 0.0, hardware=hardware)


def _measured_cpu_flops(dtype: torch.dtype = torch.bfloat16) -> float:
    """:return: operations per second of a matrix product in this process, in a fifth of a second"""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    a @ b
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        a @ b
        rounds += 1
    return rounds * 2 * 1024**3 / (time.perf_counter() - started)


def find_machine(
    gpu: str | None = None, ram: str | None = None, disk: str | Path | None = None
) -> Machine:
    """
    :param gpu: see `find_device`
    :param ram: size of host memory; None for that of this machine
    :param disk: folder whose free space counts, or a folder to be made; or a size. None for the
        working folder
    :raises ValueError: if a size or a card is not known
    """
    memory = float(psutil.virtual_memory().total) if ram is None else parse_size(ram)
    free, path = _free_space(disk)
    return Machine(find_device(gpu), memory, free, path)


def _free_space(disk: str | Path | None) -> tuple[float, str]:
    if isinstance(disk, str) and not Path(disk).exists():
        try:
            return parse_size(disk), f"a disk of {disk}"
        except ValueError:
            pass
    path = Path("." if disk is None else disk).absolute()
    there = next(x for x in (path, *path.parents) if x.exists())
    return float(shutil.disk_usage(there).free), str(path)
