"""Figures of matplotlib as SVG that stands inside an HTML page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "inline_svg"]

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

# A colour of a figure stands for a colour of the page, which differs in light and dark. These are
# names, not colours that anybody sees.
_NAMES = ("ink", "muted", "line", "page", "first", "second", *(f"step{i}" for i in range(6)))
COLOURS = {name: f"#{0xABC000 + number:06x}" for number, name in enumerate(_NAMES)}

_VARIABLES = {code: f"var(--{name})" for name, code in COLOURS.items()}
_CODE = re.compile("|".join(_VARIABLES))
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COORDINATE = re.compile(r"-?\d+\.\d{2,}")


def inline_svg(figure: Figure, name: str, title: str, labels: dict[str, str]) -> str:
    """
    :param figure: in the colours of `COLOURS`
    :param name: of the figure on its page; every id begins with it
    :param title: what the figure shows, for those who cannot see it
    :param labels: gid of an artist -> text that is shown where one points at it
    :return: an ``svg`` element that takes its font and colours from the page
    """
    import matplotlib

    file = io.StringIO()
    # Text stays text, in the font of the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for tag in ("metadata", "defs/style"):  # a style would apply to the whole page
        parent = root if "/" not in tag else root.find(f"{{{SVG}}}{tag.split('/')[0]}")
        child = None if parent is None else parent.find(f"{{{SVG}}}{tag.split('/')[-1]}")
        if parent is not None and child is not None:
            parent.remove(child)
    for element in root.iter():
        _adapt(element, name)
    for gid, label in labels.items():
        parent = root.find(f".//*[@id='{name}-{gid}']")
        if parent is not None:
            child = ElementTree.Element(f"{{{SVG}}}title")
            child.text = label
            parent.insert(0, child)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("id", name)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    heading = ElementTree.Element(f"{{{SVG}}}title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str) -> None:
    """Ids begin with the name; fonts and colours are the page's; coordinates have one decimal."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            value = f"{name}-{value}"
        elif key == f"{{{XLINK}}}href":
            del element.attrib[key]
            key, value = "href", f"#{name}-{value.removeprefix('#')}"
        else:
            value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
            value = _CODE.sub(lambda match: _VARIABLES[match[0]], _FONT.sub("", value))
        if key in ("d", "x", "y", "width", "height", "transform"):
            value = _COORDINATE.sub(lambda match: f"{float(match[0]):.1f}", value)
            value = " ".join(value.split())
        element.set(key, value)
    if element.tag != f"{{{SVG}}}text" and element.text is not None and not element.text.strip():
        element.text = None
    if element.tail is not None and not element.tail.strip():
        element.tail = None
