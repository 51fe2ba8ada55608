"""`recipes`: the recipes that the package ships, and a start for one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround_modifier import defaults
from autoround_modifier.cli.options import AsJson
from autoround_modifier.cli.outcome import reported
from autoround_modifier.cli.tables import print_json, print_table

if TYPE_CHECKING:
    from autoround_modifier.recipe_files import RecipeSummary

__all__ = ["app"]

app = typer.Typer(help="List, show and start recipes.", no_args_is_help=True)


@app.command("list")
@reported
def list_recipes(
    as_json: AsJson = False,
) -> None:
    """
    The shipped recipes, with bits per weight and the engines that run them.

    Bits per weight are those of a layer of 4096 x 4096 as it is saved, with scales and zero points.
    """
    from autoround_modifier import recipe_files
    from autoround_modifier.engines.tables import SHOWN_ENGINES

    summaries = [recipe_files.summarize_recipe(x) for x in recipe_files.list_recipes().values()]
    documents = [_document(summary) for summary in summaries]
    if as_json:
        print_json(documents)
        return
    print_table(
        ("recipe", "bits", *SHOWN_ENGINES, "what it makes"),
        [
            (
                document["name"],
                _bits(document),
                *(
                    engine["hardware"]
                    for engine in document["engines"]
                    if engine["engine"] in SHOWN_ENGINES
                ),
                document["description"],
            )
            for document in documents
        ],
    )


@app.command("show")
@reported
def show_recipe(
    name: Annotated[str, typer.Argument(help="of a shipped recipe, or a file")],
) -> None:
    """Print a recipe."""
    from autoround_modifier.recipe_files import find_recipe, read_recipe

    typer.echo(read_recipe(find_recipe(name)), nl=False)


@app.command("new")
@reported
def new_recipe(
    file: Annotated[Path, typer.Argument(help="to write; it must not exist")],
    source: Annotated[
        str, typer.Option("--from", help="shipped recipe, or a file, to start from")
    ] = defaults.RECIPE,
) -> None:
    """Write a recipe with comments, to be changed and given to `quantize`."""
    from autoround_modifier.errors import OutputExistsError
    from autoround_modifier.recipe_files import new_recipe
    from autoround_modifier.runs.files import write_atomically

    text = new_recipe(source)
    if file.exists():
        raise OutputExistsError(f"{file} is there already; name another file")
    write_atomically(file, text)
    typer.echo(f"{file} is written, made from {source}")


def _document(summary: RecipeSummary) -> dict[str, Any]:
    from autoround_modifier.cli.kernels import hardware_of
    from autoround_modifier.scheme_catalogue import supports_of, written_scheme
    from autoround_modifier.scheme_names import saved_bits_per_weight

    return {
        "name": summary.name,
        "description": summary.description,
        "avg_bits": summary.avg_bits,
        "kv_cache_quantized": summary.kv_cache,
        "schemes": [
            {
                "scheme": written_scheme(group).label,
                "targets": group.get("targets", []),
                "bits_per_weight": saved_bits_per_weight(group),
            }
            for group in summary.groups
        ],
        "engines": [
            {
                "engine": support.engine,
                "version": support.version,
                "loads": support.loads,
                "hardware": hardware_of(support),
            }
            for support in supports_of(summary.groups, kv_cache=summary.kv_cache)
        ],
    }


def _bits(document: dict[str, Any]) -> str:
    """:return: of each scheme, or the budget of a search among them"""
    each = ", ".join(dict.fromkeys(f"{x['bits_per_weight']:.2f}" for x in document["schemes"]))
    return each if document["avg_bits"] is None else f"{document['avg_bits']} of {each}"
