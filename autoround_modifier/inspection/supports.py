"""What each engine makes of layers, whether they are saved already or a recipe will save them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoround_modifier.engines.answers import EngineSupport
from autoround_modifier.engines.environment import EngineEnvironment
from autoround_modifier.engines.hardware import Hardware
from autoround_modifier.engines.layers import ShapedLayer, alike_layers, fused_layers
from autoround_modifier.engines.support import find_support
from autoround_modifier.engines.tables import ENGINE_TABLES
from autoround_modifier.inspection.exportable import export_problems

__all__ = ["supports_of_layers"]


def supports_of_layers(
    layers: Sequence[ShapedLayer],
    folder: str,
    hardware: Iterable[Hardware],
    *,
    unquantized: Sequence[str] = (),
    kv_cache: bool = False,
    single_group: bool = True,
    dtype: str | None = None,
    environment: EngineEnvironment | None = None,
) -> tuple[EngineSupport, ...]:
    """
    :param layers: of a checkpoint that are quantized
    :param folder: of it, for commands
    :param hardware: that is asked for
    :param unquantized: names of linear layers that are not quantized
    :param kv_cache: whether the key-value cache is
    :param single_group: whether the checkpoint has one config group, that targets ``Linear``
    :param dtype: of the model's activations, ``bfloat16`` or ``float16``; None if it is not known
    :param environment: whose engines are asked; None for engines in the versions of the tables,
        with all packages that their kernels need
    :return: one answer for each engine, in the order of `ENGINE_TABLES`
    """
    plain, fused = alike_layers(layers), alike_layers(fused_layers(layers))
    exportable = export_problems(layers, unquantized, kv_cache)
    engines = {} if environment is None else environment.engines
    hardware = tuple(hardware)
    return tuple(
        find_support(
            table,
            fused if table.fuses else plain,
            folder,
            hardware,
            single_group=single_group,
            version=engines.get(table.engine),
            exportable=exportable,
            packages=(
                environment.packages
                if environment is not None and table.engine in engines
                else None
            ),
            dtype=dtype,
        )
        for table in ENGINE_TABLES
    )
