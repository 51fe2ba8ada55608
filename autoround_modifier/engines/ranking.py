"""In which order engines are recommended."""

from __future__ import annotations

from collections.abc import Iterable

from autoround_modifier.engines.answers import EngineSupport
from autoround_modifier.engines.hardware import Hardware
from autoround_modifier.engines.tables import ENGINE_TABLES

__all__ = ["ranked"]

_ORDER = {table.engine: number for number, table in enumerate(ENGINE_TABLES)}
_PREFERS = {table.engine: table.prefers for table in ENGINE_TABLES}


def ranked(supports: Iterable[EngineSupport], hardware: Hardware) -> list[EngineSupport]:
    """
    Weights that stay packed in memory come before weights in 16 bits, what reads the checkpoint
    as it is before what needs an export, engines made for the platform before others, and the rest
    in the order of `ENGINE_TABLES`. Speed is not compared.

    :param supports: each of which knows about the hardware
    :return: those that load there, the best first
    """

    def rank(support: EngineSupport) -> tuple[bool, bool, bool, int]:
        return (
            support.unpacks and bool(support.kernels[hardware]),
            bool(support.export_on(hardware)),
            hardware.platform not in _PREFERS.get(support.engine, ()),
            _ORDER.get(support.engine, len(_ORDER)),
        )

    return sorted((x for x in supports if x.loads_on(hardware)), key=rank)
