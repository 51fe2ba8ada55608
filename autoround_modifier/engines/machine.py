"""Which engines and which accelerator this machine has. Engines are not imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from autoround_modifier.engines.support import Hardware
from autoround_modifier.engines.tables import ENGINE_TABLES

__all__ = ["Machine", "this_machine"]


@dataclass(frozen=True)
class Machine:
    """
    :param hardware: the first accelerator, or the CPU
    :param name: of the accelerator
    :param engines: name of each installed engine -> version
    """

    hardware: Hardware
    name: str
    engines: dict[str, str]


def this_machine() -> Machine:
    """:return: what the Python environment of this process has"""
    versions = {table.engine: _version(table.packages) for table in ENGINE_TABLES}
    hardware, name = _accelerator()
    return Machine(hardware, name, {engine: x for engine, x in versions.items() if x is not None})


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _accelerator() -> tuple[Hardware, str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return Hardware("cpu"), "CPU"
    if accelerator.type != "cuda":
        return Hardware(accelerator.type), accelerator.type.upper()
    name = torch.cuda.get_device_name()
    if torch.version.hip is not None:
        return Hardware("rocm"), name
    major, minor = torch.cuda.get_device_capability()
    return Hardware("cuda", 10 * major + minor), name
