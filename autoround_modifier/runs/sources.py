"""Which code of this package made a result: a digest of its source files."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

__all__ = ["source_digest"]

PACKAGE = Path(__file__).parent.parent


@functools.cache
def source_digest(*rooms: str) -> str:
    """
    :param rooms: folders of the package, such as ``formats``
    :return: of all Python files in them. Any edit changes it, that of a comment as well. Where the
        package is installed without sources it is the same for all versions
    """
    digest = hashlib.blake2b(digest_size=16)
    for room in rooms:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()
