"""Names of tensors in GGUF files. Experts of a block are one tensor there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.errors import ExportError, listed

__all__ = ["stack_of", "stacked", "tensor_names"]

LANGUAGE_MODEL = "language_model."


def stack_of(name: str) -> str:
    """:return: the name of a layer without the number of an expert: alike for those of a block"""
    return EXPERT.sub("*", name)


def stacked(names: Iterable[str]) -> dict[str, list[str]]:
    """
    :param names: of layers
    :return: by `stack_of`; experts in the order of their numbers
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(stack_of(name), []).append(name)
    return {stack: sorted(layers, key=_number) for stack, layers in found.items()}


def _number(name: str) -> int:
    found = EXPERT.search(name)
    return int(found[0]) if found else 0


def tensor_names(
    layers: Iterable[str],
    architecture: str,
    blocks: int,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, list[str]]:
    """
    :param layers: their names in the checkpoint
    :param architecture: of the model, as in GGUF
    :param blocks: how many it has
    :param shapes: of the tensors in the converter's file: experts first, then rows
    :return: name of a tensor in GGUF -> the layers that are stacked in it, often one
    :raises ExportError: if the installed `gguf` does not know a layer, the converter's file has no
        such tensor, or there are not all experts
    """
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(f"the installed package `gguf` does not know the model {architecture}")
    names = gguf.get_tensor_name_map(known[architecture], blocks)
    result: dict[str, list[str]] = {}
    for stack, found in stacked(layers).items():
        spelled = (names.get_name(f"{name}.weight", (".weight",)) for name in _spellings(stack))
        tensor = next((name for name in spelled if name is not None), None)
        if tensor is None:
            raise ExportError(
                f"`gguf` has no name for {listed(found)} in a model of kind {architecture}"
            )
        if tensor not in shapes:
            raise ExportError(f"llama.cpp's converter writes no tensor {tensor} for {found[0]}")
        experts = shapes[tensor][0] if len(shapes[tensor]) == 3 else 1
        if experts != len(found):
            raise ExportError(
                f"{tensor} holds {experts} experts in one type, and {len(found)} of them are "
                f"quantized: {listed(found)}"
            )
        result[tensor] = found
    return result


def _spellings(stack: str) -> Iterator[str]:
    """Yield the names under which `gguf` may know the layers."""
    name = stack.replace(".*.", ".")
    yield name
    if LANGUAGE_MODEL in name:
        yield name.replace(LANGUAGE_MODEL, "")
