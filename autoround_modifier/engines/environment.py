"""Which engines and which accelerator are at hand. Engines are not imported."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from autoround_modifier.engines.hardware import Hardware
from autoround_modifier.engines.tables import ENGINE_TABLES

__all__ = ["EngineEnvironment", "this_environment"]


@dataclass(frozen=True)
class EngineEnvironment:
    """
    :param hardware: the first accelerator, or the CPU
    :param name: of the accelerator
    :param engines: name of each installed engine -> version; the name of a program where that is
        all that is known
    :param packages: those that are installed, of the packages which kernels need beside an engine
    """

    hardware: Hardware
    name: str
    engines: dict[str, str]
    packages: frozenset[str] = frozenset()


def this_environment() -> EngineEnvironment:
    """:return: what the Python environment of this process has"""
    versions = {
        table.engine: _version(table.packages) or _program(table.programs)
        for table in ENGINE_TABLES
    }
    needed = {row.package for table in ENGINE_TABLES for row in table.rows if row.package}
    hardware, name = _accelerator()
    return EngineEnvironment(
        hardware,
        name,
        {engine: version for engine, version in versions.items() if version is not None},
        frozenset(package for package in needed if _version((_plain(package),)) is not None),
    )


def _plain(package: str) -> str:
    """:return: name of a package that pip takes from a repository"""
    return "humming-kernels" if package.endswith("/humming.git") else package


def _version(packages: Iterable[str]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _program(programs: Iterable[str]) -> str | None:
    return next((name for name in programs if shutil.which(name) is not None), None)


def _accelerator() -> tuple[Hardware, str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return Hardware("cpu"), "CPU"
    if accelerator.type != "cuda":
        platform = "metal" if accelerator.type == "mps" else accelerator.type
        return Hardware(platform), accelerator.type.upper()
    name = torch.cuda.get_device_name()
    if torch.version.hip is not None:
        return Hardware("rocm"), name
    major, minor = torch.cuda.get_device_capability()
    return Hardware("cuda", 10 * major + minor), name
