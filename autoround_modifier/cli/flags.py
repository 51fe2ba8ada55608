"""Flags made of the fields of pydantic models, with their descriptions and defaults."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from autoround_modifier.cli.outcome import UsageError

__all__ = ["FieldFlags", "with_fields"]

# What the parser of the command line reads itself; everything else is text in YAML.
SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class FieldFlags:
    """
    :param model: its fields become flags, none of which is required
    :param panel: heading of the flags in the help
    :param prefix: of their names
    :param names: field -> names of its flag, in place of the prefix and the field's name
    :param without: fields that get no flag
    """

    model: type[BaseModel]
    panel: str
    prefix: str = ""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: frozenset[str] = frozenset()

    def parameters(self) -> dict[str, tuple[str, inspect.Parameter]]:
        """:return: name of a parameter of a command -> the field, and the parameter"""
        found = {}
        for name, info in self.model.model_fields.items():
            if name not in self.without:
                parameter = f"{self.prefix}{name}"
                found[parameter] = (name, self._parameter(parameter, name, info))
        return found

    def value(self, name: str, given: Any) -> Any:
        """
        :param name: of a field
        :param given: what the command line has for it
        :return: the value of the field
        :raises UsageError: if text that should be YAML is not
        """
        annotation = self.model.model_fields[name].annotation
        kind = _parsed_kind(annotation)
        if kind == list[str]:
            return _split(given)
        if kind is not str or _optional(annotation) is str:
            return given
        try:
            return yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise UsageError(f"{self._flags(f'{self.prefix}{name}', name)[0]}: {error}") from error

    def _parameter(self, parameter: str, name: str, info: FieldInfo) -> inspect.Parameter:
        kind = _parsed_kind(info.annotation)
        flags = self._flags(parameter, name)
        if kind is bool:
            flags = (*flags[:-1], f"{flags[-1]}/--no-{flags[-1].removeprefix('--')}")
        option = typer.Option(
            *flags,
            metavar="YAML" if kind is str and _optional(info.annotation) is not str else None,
            help=info.description or "",
            rich_help_panel=self.panel,
            show_default=_shown_default(info),
        )
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        return inspect.Parameter(
            parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )

    def _flags(self, parameter: str, name: str) -> tuple[str, ...]:
        return self.names.get(name) or (f"--{parameter.replace('_', '-')}",)


def with_fields(**groups: FieldFlags) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Decorate a command that takes, for each group, a mapping of the fields that were given; its
    flags take their places in the signature.

    :param groups: by the name of that parameter
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = {group: flags.parameters() for group, flags in groups.items()}

        @wraps(command)
        def run(**given: Any) -> None:
            fields: dict[str, dict[str, Any]] = {group: {} for group in groups}
            for group, parameters in flags.items():
                for parameter, (name, _) in parameters.items():
                    value = given.pop(parameter)
                    if value not in (None, []):
                        fields[group][name] = groups[group].value(name, value)
            command(**given, **fields)

        own = inspect.signature(command, eval_str=True).parameters.values()
        added = [item for parameters in flags.values() for _, item in parameters.values()]
        kept = [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in own if x.name not in groups]
        run.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {x.name: x.annotation for x in [*kept, *added]}
        del run.__wrapped__
        return run

    return decorate


def _optional(annotation: Any) -> Any:
    """:return: the type without None"""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [x for x in typing.get_args(annotation) if x is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def _parsed_kind(annotation: Any) -> Any:
    """:return: the type that the command line parses: a scalar, a list of text, or text"""
    kind = _optional(annotation)
    if kind in SCALARS or typing.get_origin(kind) is Literal:
        return kind
    members = typing.get_args(kind)
    is_list = typing.get_origin(kind) is list or list[str] in members
    if is_list and typing.get_origin(members[0]) is not list:
        return list[str]
    return str


def _split(values: list[str]) -> list[str]:
    """:return: the same, where names are separated by commas as well; expressions are not split"""
    return [
        part
        for value in values
        for part in ([value] if value.startswith("re:") else value.split(","))
    ]


def _shown_default(info: FieldInfo) -> str | bool:
    value = info.default
    if info.default_factory is not None:
        value = info.default_factory()  # type: ignore[call-arg]
    if value is None or value is PydanticUndefined or value == []:
        return False
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
