"""host/versions.py: versions of the libraries, without package metadata."""

from __future__ import annotations

from importlib.metadata import version

from autoround_modifier.host.versions import library_versions


def test_versions_are_those_installed():
    assert library_versions() == {
        "torch": version("torch"),
        "compressed-tensors": version("compressed-tensors"),
    }
