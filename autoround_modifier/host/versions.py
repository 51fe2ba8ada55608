"""Versions of the libraries whose arithmetic results depend on."""

from __future__ import annotations

import compressed_tensors
import torch

__all__ = ["library_versions"]


def library_versions() -> dict[str, str]:
    """:return: name of the package -> its version; no package metadata is needed"""
    return {"torch": torch.__version__, "compressed-tensors": compressed_tensors.__version__}
