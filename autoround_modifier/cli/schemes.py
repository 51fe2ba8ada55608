"""`schemes`: what can be written as a scheme, and what runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround_modifier.cli.options import AsJson
from autoround_modifier.cli.tables import print_json, print_table

if TYPE_CHECKING:
    from autoround_modifier.scheme_catalogue import SchemeEntry

__all__ = ["schemes"]

MORE_NAMES = (
    "Integer weights also with zero points, with another group size, or both: W2A16G64, "
    "W4A16_ASYM, W3A16_ASYM_G32. `--scheme`, and `options` of a recipe, take all of them; `scheme` "
    "of a recipe takes the names of the table. Those of GGUF are for `scheme` and `--scheme` alone."
)


def schemes(
    name: Annotated[
        str | None, typer.Argument(help="one scheme, such as W4A16, W2A16G64 or NVFP4")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    What can be written as a scheme, its size, and which engines run it.

    Bits per weight are those of a layer of 4096 x 4096 as it is saved, with scales and zero points.
    With a NAME, the kernel of each engine by hardware, and the fields for a recipe.
    """
    from autoround_modifier.scheme_catalogue import describe_schemes, scheme_names

    entries = describe_schemes(scheme_names() if name is None else [name])
    if as_json:
        print_json([_document(entry) for entry in entries])
    elif name is None:
        _print_all(entries)
    else:
        _print_one(entries[0])


def _document(entry: SchemeEntry) -> dict[str, Any]:
    from autoround_modifier.cli.kernels import kernels_as_json

    return {
        "name": entry.name,
        "aliases": entry.aliases,
        "weights": entry.scheme.weights,
        "activations": entry.scheme.activations,
        "bits_per_weight": entry.bits_per_weight,
        "fields": entry.group,
        "engines": [
            {
                "engine": support.engine,
                "version": support.version,
                "loads": support.loads,
                "hardware": kernels_as_json(support),
            }
            for support in entry.engines
        ],
        "recipes": entry.recipes,
    }


def _print_all(entries: list[SchemeEntry]) -> None:
    from autoround_modifier.cli.kernels import hardware_of
    from autoround_modifier.engines.tables import SHOWN_ENGINES

    print_table(
        ("scheme", "bits", "layers", *SHOWN_ENGINES, "recipes"),
        [
            (
                ", ".join((entry.name, *entry.aliases)),
                f"{entry.bits_per_weight:.3f}",
                entry.scheme.label,
                *(hardware_of(x) for x in entry.engines if x.engine in SHOWN_ENGINES),
                ", ".join(entry.recipes),
            )
            for entry in entries
        ],
        ("bits",),
    )
    typer.echo(MORE_NAMES)


def _print_one(entry: SchemeEntry) -> None:
    import yaml

    from autoround_modifier.cli.kernels import print_kernels

    typer.echo(", ".join((entry.name, *entry.aliases)))
    typer.echo(f"  weights           {entry.scheme.weights}")
    typer.echo(f"  activations       {entry.scheme.activations}")
    typer.echo(f"  bits per weight   {entry.bits_per_weight:.3f}, as saved, of a 4096 x 4096 layer")
    typer.echo(f"  recipes           {', '.join(entry.recipes) or 'none is shipped'}")
    typer.echo()
    print_kernels(entry.engines)
    typer.echo("\nThe same, spelled out in a recipe:")
    fields: dict[str, Any] = {"config_groups": {"group_0": {"targets": ["Linear"], **entry.group}}}
    if entry.scheme.family == "gguf":  # which compressed-tensors cannot spell out
        fields = {"scheme": entry.name}
    for line in yaml.safe_dump(fields, sort_keys=False).splitlines():
        typer.echo(f"  {line}")
