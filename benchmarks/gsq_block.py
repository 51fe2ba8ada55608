"""
The two halves of a decoder block, which GSQ trains one after the other, and what the layers in them
are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.group import BlockGroup

__all__ = ["after_attention", "after_mlp", "hessians_recorded", "outputs"]


def after_attention(group: BlockGroup, hidden: Tensor, samples: list[int]) -> Tensor:
    """
    The first half: attention and the sum with its input.

    :param group: of one block
    :param hidden: (len(samples), tokens, hidden), the input of the block
    :param samples: which samples these are
    :return: what the norm before the MLP is given, same shape
    """
    (block,) = group.blocks

    def stop(norm: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    handle = _norm_before_mlp(block).register_forward_pre_hook(stop)
    try:
        group.forward(hidden, samples)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise RuntimeError(f"{type(block).__name__} does not call the norm before its MLP")


def after_mlp(block: nn.Module, hidden: Tensor) -> Tensor:
    """
    The second half, as in Llama and, with a norm after the MLP, in Gemma.

    :param hidden: the result of `after_attention`
    :return: the output of the block, same shape
    """
    output = block.mlp(_norm_before_mlp(block)(hidden))  # type: ignore[operator]
    norm = getattr(block, "post_feedforward_layernorm", None)
    return hidden + (output if norm is None else norm(output))


def _norm_before_mlp(block: nn.Module) -> nn.Module:
    norm = getattr(block, "pre_feedforward_layernorm", None)
    return block.post_attention_layernorm if norm is None else norm  # type: ignore[return-value]


class _Reached(BaseException):
    """Ends the run of a block; no `Exception`, which the group would report."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@torch.no_grad()
def outputs(
    run: Callable[[Tensor, list[int]], Tensor],
    group: BlockGroup,
    inputs: list[Tensor],
    batch_size: int,
) -> list[Tensor]:
    """
    :param run: takes stacked inputs and the samples that they are of
    :param inputs: (1, tokens, hidden) per sample
    :return: the same of the outputs
    """
    found = list(inputs)
    for indices, hidden in group.batches(inputs, batch_size):
        for index, row in zip(indices, run(hidden, indices), strict=True):
            found[index] = row.unsqueeze(0).clone()
    return found


@contextmanager
def hessians_recorded(layers: Iterable[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
    """
    :return: while it lasts, the sum over tokens of the outer product of what each layer is given,
        (in_features, in_features), float32; layers that are given the same tensor share it
    """
    found: dict[nn.Linear, Tensor] = {}
    last: tuple[nn.Linear | None, Tensor | None] = (None, None)

    def record(layer: nn.Linear, args: tuple[Any, ...]) -> None:
        nonlocal last
        (hidden,) = args
        leader, seen = last
        if leader is not None and seen is hidden:
            found[layer] = found[leader]
            return
        last = layer, hidden
        rows = hidden.flatten(0, -2).float()
        if layer in found:
            found[layer].addmm_(rows.T, rows)
        else:
            found[layer] = rows.T @ rows

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
