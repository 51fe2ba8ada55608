"""Templates of the page and of the model card."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from autoround_modifier.readable import (
    bits_text,
    bytes_text,
    count_text,
    figures_text,
    percent_text,
)

__all__ = ["template"]


def template(name: str, autoescape: bool, **filters: Callable[..., object]) -> Template:
    """
    :param name: of a file in this folder
    :param autoescape: whether what is filled in is escaped for HTML
    :param filters: beside those for numbers
    :return: the template, which fails on a name that it is not given
    """
    environment = Environment(
        loader=PackageLoader("autoround_modifier.report", ""),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bits": bits_text,
        "bytes": bytes_text,
        "count": count_text,
        "figures": figures_text,
        "percent": percent_text,
        **filters,
    }
    return environment.get_template(name)
