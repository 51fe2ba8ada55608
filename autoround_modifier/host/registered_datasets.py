"""The datasets that LLM-Compressor knows by name."""

from __future__ import annotations

from compressed_tensors.registry import standardize_lookup_name
from llmcompressor.transformers.data import TextGenerationDataset

__all__ = ["is_registered_dataset", "registered_datasets"]

# A base class for data of the user's, which needs more arguments than a name
_NOT_A_DATASET = "custom"


def registered_datasets() -> list[str]:
    """:return: names, sorted"""
    return sorted(set(TextGenerationDataset.registered_names()) - {_NOT_A_DATASET})


def is_registered_dataset(name: str) -> bool:
    """:return: whether LLM-Compressor loads a dataset by this name, or by an alias"""
    if ":" in name:  # a module and a name in it, which LLM-Compressor imports
        return True
    known = {*TextGenerationDataset.registered_names(), *TextGenerationDataset.registered_aliases()}
    return standardize_lookup_name(name) in known
