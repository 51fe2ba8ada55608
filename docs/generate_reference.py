"""
Makes the pages of the reference when the site is built, so that they cannot differ from the code.

MkDocs calls `on_files` (see ``hooks`` in mkdocs.yml). Six pages are added, none is written to
disk:

- ``reference/fields.md``: the fields of the three modifiers and the presets, from pydantic
- ``reference/recipes.md``: the shipped recipes, from the comments and fields of their files
- ``reference/report-files.md``: the files beside a checkpoint, from their pydantic models
- ``reference/commands.md``: the flags of every command, from the command line itself
- ``reference/engines.md``: which kernel of which engine runs what, from the tables of engines
- ``reference/api.md``: every name in ``autoround_modifier.__all__``, for mkdocstrings
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import typer
import yaml
from annotated_types import Ge, Gt, Le, Lt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import autoround_modifier
from autoround_modifier.cli.main import app
from autoround_modifier.engines.hardware import DEVICES, Hardware
from autoround_modifier.engines.ranking import ranked
from autoround_modifier.engines.rows import EngineTable, Row
from autoround_modifier.engines.tables import ENGINE_TABLES
from autoround_modifier.recipe_files import summarize_recipe
from autoround_modifier.report import schema
from autoround_modifier.scheme_catalogue import supports_of

# A warning ends `mkdocs build --strict`.
logger = logging.getLogger("mkdocs.hooks.generate_reference")

BOUNDS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "at least"),
    Gt: ("gt", "more than"),
    Le: ("le", "at most"),
    Lt: ("lt", "less than"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "fields": fields_page,
        "recipes": recipes_page,
        "report-files": report_files_page,
        "commands": commands_page,
        "engines": engines_page,
        "api": api_page,
    }
    for name, make in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


# ---------------------------------------------------------------------- fields


def modifiers() -> list[type[BaseModel]]:
    """:return: the exported modifiers, `AutoRoundModifier` first"""
    classes = [
        value
        for value in map(exported, autoround_modifier.__all__)
        if inspect.isclass(value) and issubclass(value, BaseModel)
    ]
    return sorted(classes, key=lambda x: (x.__name__ != "AutoRoundModifier", x.__name__))


def exported(name: str) -> Any:
    return getattr(autoround_modifier, name)


def fields_page() -> str:
    lines = ["# Fields of the modifiers", "", "Made from the classes when this site is built.", ""]
    for modifier in modifiers():
        name = modifier.__name__
        described = descriptions(modifier)
        own = [x for x in modifier.model_fields if belongs_to_package(modifier, x)]
        inherited = [x for x in described if x in modifier.model_fields and x not in own]
        shown = [x for x in own if described.get(x)]
        # `requires_calibration_data` is set by the modifiers themselves.
        for missing in set(own) - set(shown) - {"requires_calibration_data"}:
            logger.warning("%s.%s has no description", name, missing)
        lines += [f"## {name}", "", summary(modifier), ""]
        lines += fields_table(modifier, shown, described)
        if inherited:
            lines += ["", "Inherited from LLM-Compressor:", ""]
            lines += fields_table(modifier, inherited, described)
        lines.append("")
    return "\n".join([*lines, *presets_section()])


def belongs_to_package(modifier: type[BaseModel], field: str) -> bool:
    """:return: whether a class of this package declares the field"""
    owners = [x for x in modifier.__mro__ if field in inspect.get_annotations(x)]
    return bool(owners) and owners[0].__module__.partition(".")[0] == "autoround_modifier"


def descriptions(modifier: type[BaseModel]) -> dict[str, str]:
    """:return: field -> its description, else the ``:param`` of a docstring of the package"""
    found: dict[str, str] = {}
    for base in reversed(modifier.__mro__):
        if base.__module__.partition(".")[0] == "autoround_modifier":
            found |= parameters(base.__doc__ or "")
            if issubclass(base, BaseModel):
                fields = base.model_fields.items()
                found |= {k: v.description for k, v in fields if v.description}
    return found


def parameters(docstring: str) -> dict[str, str]:
    """:return: name -> text of each ``:param name: text``"""
    pattern = r"^\s*:(?:param|ivar) (\w+): (.*?)(?=^\s*:|^\s*$|\Z)"
    return dict(re.findall(pattern, docstring, re.MULTILINE | re.DOTALL))


def summary(modifier: type[BaseModel]) -> str:
    """:return: the first paragraph of the class's docstring"""
    text = inspect.getdoc(modifier) or ""
    return text.split("\n\n")[0].strip().rstrip(":.") + "."


def fields_table(
    modifier: type[BaseModel], names: Iterable[str], described: dict[str, str]
) -> list[str]:
    rows = [
        (
            f"`{name}`",
            allowed(field),
            default(field, name in preset_fields() and "preset" in modifier.model_fields),
            described[name],
        )
        for name in names
        for field in [modifier.model_fields[name]]
    ]
    return table(("field", "type", "default", "meaning"), rows)


def allowed(field: FieldInfo) -> str:
    """:return: the type as a recipe's author writes it, with its bounds"""
    bounds = [
        f"{words} {getattr(item, attribute)}"
        for item in field.metadata
        for kind, (attribute, words) in BOUNDS.items()
        if isinstance(item, kind)
    ]
    return ", ".join([written(field.annotation), *bounds])


def written(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [written(x) for x in arguments if x is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is typing.Literal:
        return " or ".join(f"`{x}`" for x in arguments)
    if origin in (list, tuple):
        return f"list of {written(arguments[0])}" if arguments else "list"
    if origin is dict or annotation is dict:
        return "mapping"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    words = {bool: "true or false", int: "integer", float: "number", str: "text"}
    return words.get(annotation, str(getattr(annotation, "__name__", annotation)))


def default(field: FieldInfo, from_preset: bool) -> str:
    """:param from_preset: whether None stands for the value of the preset"""
    value = field.default
    if field.default_factory is not None:
        value = typing.cast(Callable[[], Any], field.default_factory)()
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "from the preset" if from_preset else "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != [] else "empty"


def preset_fields() -> list[str]:
    preset = next(iter(autoround_modifier.PRESETS.values()))
    return [field.name for field in dataclasses.fields(preset)]


def presets_section() -> list[str]:
    names = preset_fields()
    rows = [
        (f"`{name}`", *(preset_value(getattr(preset, field)) for field in names))
        for name, preset in autoround_modifier.PRESETS.items()
    ]
    header = ("preset", *(f"`{name}`" for name in names))
    text = "`preset` stands for these values. A field that is given replaces the preset's value."
    return ["## Presets", "", text, "", *table(header, rows), ""]


def preset_value(value: Any) -> str:
    return "default" if value is None else str(value).lower()


# ---------------------------------------------------------------------- recipes


def recipes_page() -> str:
    lines = [
        "# Shipped recipes",
        "",
        'Each can be used by name: `oneshot(..., recipe="w4a16_autoround")`. '
        '`load_recipe(name, preset="light")` replaces fields of its `AutoRoundModifier`.',
        "",
    ]
    contents = {name: path.read_text() for name, path in autoround_modifier.list_recipes().items()}
    rows = [(f"[`{name}`](#{name})", first_sentence(text)) for name, text in contents.items()]
    lines += table(("recipe", "what it makes"), rows)
    for name, text in contents.items():
        comment, body = split_recipe(text)
        lines += ["", f"## `{name}` {{ #{name} }}", "", comment, "", "```yaml", body, "```"]
    return "\n".join(lines) + "\n"


def split_recipe(text: str) -> tuple[str, str]:
    """:return: the comment at the top without its example of a call, and the YAML below it"""
    lines = text.splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    comment = "\n".join(line.lstrip("#").removeprefix(" ") for line in lines[:end])
    paragraphs = [x for x in comment.split("\n\n") if not x.lstrip().startswith("oneshot(")]
    body = "\n".join(lines[end:])
    if not isinstance(yaml.safe_load(body), dict):
        logger.warning("recipe is not a mapping: %s", body[:60])
    return "\n\n".join(x.strip() for x in paragraphs if x.strip()), body


def first_sentence(text: str) -> str:
    comment = " ".join(split_recipe(text)[0].split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z0-9])", comment)[0]


# ---------------------------------------------------------------------- report files


def report_files_page() -> str:
    lines = [
        "# Report files",
        "",
        "What lies beside a checkpoint, as JSON. `version` is raised where a field changes its "
        "meaning; within a version, fields may be added. `autoround_modifier.report.schema` has "
        "the models that read these files.",
        "",
    ]
    files = {
        schema.REPORT_FILE: schema.QuantizationReport,
        schema.EVALUATION_FILE: schema.Evaluation,
    }
    for file, model in files.items():
        lines += [f"## {file}", "", *record_table(model)]
        for nested in nested_records(model):
            lines += ["", f"### {nested.__name__}", ""]
            # A class without a docstring has that of its base class.
            if nested.__doc__:
                lines += [" ".join(inspect.cleandoc(nested.__doc__).split()), ""]
            lines += record_table(nested)
        lines.append("")
    return "\n".join(lines)


def record_table(model: type[BaseModel]) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        if not field.description:
            logger.warning("%s.%s has no description", model.__name__, name)
        meaning = re.sub(r"\bNone\b", "null", field.description or "")
        rows.append((f"`{name}`", record_type(field.annotation), meaning))
    return table(("field", "type", "meaning"), rows)


def record_type(annotation: Any) -> str:
    """:return: the type as it stands in JSON; a record is a link to its table"""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if x is type(None) else record_type(x) for x in arguments)
    if origin is list:
        return f"list of {record_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(record_type, arguments))}]"
    if origin is dict:
        return f"mapping of {record_type(arguments[0])} to {record_type(arguments[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return written(annotation)


def nested_records(model: type[BaseModel]) -> list[type[BaseModel]]:
    """:return: the records in its fields, in their order"""
    found: list[type[BaseModel]] = []
    waiting = [field.annotation for field in model.model_fields.values()]
    for annotation in waiting:  # which grows
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            found.append(annotation)
        waiting.extend(typing.get_args(annotation))
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------- commands


def commands_page() -> str:
    lines = ["# Commands", "", "What `--help` says, made when this site is built.", ""]
    for name, command in sorted(commands(typer.main.get_command(app)).items()):
        text = " ".join((command.help or "").split())
        lines += [f"## `{name}` {{ #{name.replace(' ', '-')} }}", "", text, ""]
        rows = [
            (
                ", ".join(f"`{flag}`" for flag in (*item.opts, *item.secondary_opts))
                if item.param_type_name == "option"
                else f"`{item.name.upper()}`",
                " ".join((getattr(item, "help", "") or "").split()),
            )
            for item in command.params
        ]
        lines += [*table(("flag", "meaning"), rows), ""]
    return "\n".join(lines)


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """:return: words of each command -> the command, those of groups included"""
    found = {}
    for name, command in group.commands.items():
        words = f"{prefix}{name}"
        found |= (
            commands(command, f"{words} ") if hasattr(command, "commands") else {words: command}
        )
    return found


# ---------------------------------------------------------------------- API


def api_page() -> str:
    lines = [
        "# Python API",
        "",
        "What `autoround_modifier` exports. Everything else is private.",
        "",
    ]
    sections: dict[str, list[str]] = {"Functions": [], "Modifiers": [], "Errors": [], "Others": []}
    for name in autoround_modifier.__all__:
        value = exported(name)
        if inspect.isclass(value) and issubclass(value, BaseModel):
            sections["Modifiers"].append(modifier_entry(name))
        elif inspect.isclass(value) and issubclass(value, Exception):
            sections["Errors"].append(directive(name))
        elif callable(value) and not inspect.isclass(value):
            sections["Functions"].append(directive(name))
        else:
            sections["Others"].append(directive(name))
    for title, entries in sections.items():
        if entries:
            lines += [f"## {title}", "", *entries]
    return "\n".join(lines)


def directive(name: str) -> str:
    return f"::: autoround_modifier.{name}\n"


def modifier_entry(name: str) -> str:
    """Its fields stand on a page of their own; its properties, read after a run, are here."""
    properties = {
        key: " ".join(inspect.getdoc(value).split())
        for base in exported(name).__mro__
        if base.__module__.partition(".")[0] == "autoround_modifier"
        for key, value in vars(base).items()
        if isinstance(value, property) and not key.startswith("_") and inspect.getdoc(value)
    }
    lines = [f"### `{name}` {{ #autoround_modifier.{name} }}", "", summary(exported(name)), ""]
    lines += [f"Its fields: [{name}](fields.md#{name.lower()}).", ""]
    if properties:
        rows = [(f"`{key}`", text) for key, text in properties.items()]
        lines += [*table(("property", "value"), rows), ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------- engines


def engines_page() -> str:
    lines = [
        "# Engines and kernels",
        "",
        "Made from the tables of `autoround_modifier/engines` when this site is built; `inspect` "
        "and `plan` answer from the same rows. How each is known: "
        "[compatibility](../compatibility.md).",
        "",
        "## The best choice for the shipped recipes",
        "",
        "Engine and kernels by hardware, for a dense model whose layers have features in multiples "
        "of 128. An engine that needs an [export](../guides/exporting.md) is marked with its "
        "format. Rules, not measurements, decide what is best.",
        "",
        *table(("recipe", *DEVICES), recipe_rows()),
        "",
    ]
    for engine in ENGINE_TABLES:
        lines += engine_section(engine)
    return "\n".join(lines)


def recipe_rows() -> Iterable[list[str]]:
    for name, path in autoround_modifier.list_recipes().items():
        recipe = summarize_recipe(path)
        supports = supports_of(recipe.groups, kv_cache=recipe.kv_cache)
        yield [f"`{name}`", *(best_choice(supports, hardware) for hardware in DEVICES.values())]


def best_choice(supports: Iterable[Any], hardware: Hardware) -> str:
    best = next(iter(ranked(supports, hardware)), None)
    if best is None:
        return "none"
    kernels = dict.fromkeys(str(choice.kernel) for choice in best.kernels[hardware])
    export = best.export_on(hardware)
    return f"{best.engine}: {', '.join(kernels)}" + (f" (`{export}`)" if export else "")


def engine_section(engine: EngineTable) -> list[str]:
    reads = (
        f"after an export to {', '.join(f'`{x}`' for x in engine.exports)}"
        if engine.exports
        else "compressed-tensors"
    )
    source = f"https://github.com/{engine.repository}"
    return [
        f"## {engine.engine}",
        "",
        f"Version {engine.version}, [source]({source}); reads {reads}. The first row that fits "
        "holds.",
        "",
        *table(
            ("kernel", "hardware", "weights", "groups", "features", "needs", "known", "source"),
            [kernel_row(row) for row in engine.rows],
        ),
        "",
    ]


def kernel_row(row: Row) -> list[str]:
    needs = [
        f"export to `{row.export}`" if row.export else "",
        f"`{row.option}`" if row.option else "",
        "one config group that targets `Linear`" if row.single_group else "",
        f"package `{row.package}`" if row.package else "",
        " or ".join(row.dtypes) if len(row.dtypes) == 1 else "",
        {True: "experts", False: "no experts", None: ""}[row.experts],
        {True: "dynamic activations", False: "static activations", None: ""}[row.dynamic],
        row.note if row.kernel else "",
    ]
    features = [
        f"{name} {multiple}"
        for name, multiple in (("out", row.out_multiple), ("in", row.in_multiple))
        if multiple > 1
    ]
    return [
        row.kernel or f"refused: {row.note}",
        ", ".join(map(str, row.on)) or "any",
        weights_text(row),
        groups_text(row),
        ", ".join(features) or "any",
        "; ".join(x for x in needs if x),
        row.known or "not known",
        f"`{row.source}`",
    ]


def weights_text(row: Row) -> str:
    """:return: families and bits, and whether there are zero points"""
    families = "any" if len(row.families) > 10 else ", ".join(row.families)
    bits = f", {', '.join(map(str, row.bits))} bits" if row.bits else ""
    zero_points = {True: ", symmetric", False: ", zero points", None: ""}[row.symmetric]
    return f"{families}{bits}{zero_points}"


def groups_text(row: Row) -> str:
    sizes = ["channel" if size == -1 else str(size) for size in row.groups]
    if row.group_multiple > 1:
        sizes.append(f"multiples of {row.group_multiple}, channel")
    return ", ".join([*sizes, *(f"by {x}" for x in row.strategies)]) or "any"


# ---------------------------------------------------------------------- Markdown


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell(x) for x in line)} |" for line in lines]


def cell(text: str) -> str:
    """:return: one line; docstrings write code with two backticks"""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())
