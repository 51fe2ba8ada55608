"""`oneshot` tells names of LLM-Compressor's own datasets from names of files and of the Hub."""

from __future__ import annotations

import pytest

from autoround_modifier.host.registered_datasets import (
    is_registered_dataset,
    registered_datasets,
)


def test_names():
    names = registered_datasets()
    assert {"c4", "ultrachat_200k", "wikitext"} <= {name.replace("-", "_") for name in names}
    assert "custom" not in names
    assert all(map(is_registered_dataset, names))


@pytest.mark.parametrize(
    ("name", "known"),
    [("ultrachat-200k", True), ("module:name", True), ("my_folder", False), ("org/name", False)],
)
def test_aliases_and_other_names(name, known):
    assert is_registered_dataset(name) is known
