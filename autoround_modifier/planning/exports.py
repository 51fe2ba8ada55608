"""Other formats of a checkpoint, in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedConfig

from autoround_modifier.exports.export_formats import GGUF
from autoround_modifier.exports.sizes import exported_bytes
from autoround_modifier.host.empty_model import empty_model
from autoround_modifier.modifiers.shape_checks import checked_exports
from autoround_modifier.planning.quantities import Quantity
from autoround_modifier.planning.settings import RecipeParts

__all__ = ["export_parts"]


def export_parts(
    config: PreTrainedConfig,
    recipe: RecipeParts,
    formats: Sequence[str],
    size: int,
    trust_remote_code: bool,
) -> Iterator[Quantity]:
    """
    Yield what each format takes on the disk.

    :param recipe: its modifiers are changed
    :param formats: of `export`
    :param size: bytes of the model as loaded
    :raises ExportError: if there is no such format, or it cannot hold what the recipe makes
    """
    if not formats:
        return
    model = empty_model(config, trust_remote_code=trust_remote_code, all_experts=True).model
    modifiers = [*([] if recipe.chooser is None else [recipe.chooser]), *recipe.tuners]
    for name, layers in checked_exports(model, modifiers, formats).items():
        if recipe.chooser is None:
            yield Quantity(f"exported to {name}", exported_bytes(name, layers))
    if any(name.startswith(GGUF) for name in formats):
        yield Quantity("the model in 16 bits, twice, while GGUF is written", 2 * size)
