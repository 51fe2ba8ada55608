"""The version of the package, and those of the packages that results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["__version__", "package_versions"]

__version__ = "0.1.0"


def package_versions(*packages: str) -> dict[str, str]:
    """
    :param packages: that may be installed
    :return: their versions, without those that are not, and those of this package, of Python and of
        the operating system
    """
    found = {"autoround_modifier": __version__}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "system": platform.platform()}
