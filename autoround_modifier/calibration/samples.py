"""One calibration sample as a block saw it, and how samples are stacked into a batch."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

__all__ = [
    "BlockCall",
    "call_token_mask",
    "content_key",
    "fingerprint",
    "output_hidden",
    "split_call",
    "stack_masks",
    "stackable",
    "token_mask",
]


@dataclass
class BlockCall:
    """
    The arguments of one block call for one sample, without its hidden states.

    :param args: positional arguments after the hidden states
    :param kwargs: keyword arguments; tensors of a batch are cut to this sample, (1, ...)
    :param hidden_name: name under which the hidden states were passed; None if positional
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None = None

    def signature(self, hidden: Tensor) -> tuple[Any, ...]:
        """:return: what two samples must share to be stacked into one batch"""
        return (tuple(hidden.shape[1:]), *self._arguments_signature)

    @cached_property
    def _arguments_signature(self) -> tuple[Any, ...]:
        leaves, structure = tree_flatten((self.args, self.kwargs))
        return (str(structure), *map(_describe, leaves))

    @staticmethod
    def stack(calls: list[BlockCall], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """
        :param calls: calls of equal `signature`
        :param hidden: (len(calls), tokens, hidden)
        :return: args and kwargs of one call of the block for all samples
        """
        flat = [tree_leaves((call.args, call.kwargs)) for call in calls]
        leaves = [_stack(list(column), hidden.device) for column in zip(*flat, strict=True)]
        structure = tree_structure((calls[0].args, calls[0].kwargs))
        args, kwargs = tree_unflatten(leaves, structure)
        if calls[0].hidden_name is None:
            return (hidden, *args), kwargs
        return args, {**kwargs, calls[0].hidden_name: hidden}


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, BlockCall]]:
    """
    Cut one block call into its samples.

    :return: hidden states (1, tokens, hidden) and the rest of the call, one pair per sample
    :raises ValueError: if the call has no hidden states to tune on
    """
    name = None
    if args and isinstance(args[0], Tensor):
        hidden, args = args[0], args[1:]
    elif isinstance(kwargs.get("hidden_states"), Tensor):
        name = "hidden_states"
        hidden = kwargs[name]
        kwargs = {key: value for key, value in kwargs.items() if key != name}
    else:
        raise ValueError(
            "the block is called without a tensor as first argument and without `hidden_states`"
        )

    batch = hidden.shape[0]

    def row(index: int, value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch
        return value[index : index + 1] if batched else value

    samples = []
    for index in range(batch):
        call_args, call_kwargs = tree_map(partial(row, index), (args, kwargs))
        samples.append((hidden[index : index + 1], BlockCall(call_args, call_kwargs, name)))
    return samples


def output_hidden(output: Any) -> Tensor:
    """:return: the hidden states (batch, tokens, hidden) in what a decoder block returns"""
    return output[0] if isinstance(output, (tuple, list)) else output


def token_mask(attention_mask: Any, num_tokens: int) -> Tensor | None:
    """
    Which tokens are real, read off the attention mask a block was given.

    A causal mask lets a token attend to itself exactly if it is not padding, so the diagonal of
    a four-dimensional mask is the token mask, for left and right padding and sliding windows.

    :param attention_mask: (batch, heads or 1, num_tokens, num_tokens), additive or bool, or
        (batch, num_tokens); anything else has nothing to say
    :return: (batch, num_tokens), bool; None if every token is real
    """
    mask = attention_mask
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4 and mask.shape[-1] == mask.shape[-2] == num_tokens:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    elif mask.ndim == 2 and mask.shape[-1] == num_tokens:
        mask = mask.bool()
    else:
        return None
    return None if bool(mask.all()) else mask


def call_token_mask(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss_mask: Tensor | None
) -> Tensor | None:
    """
    Which tokens of a block call count: those that are not padding and that the dataset's
    ``loss_mask`` does not exclude.

    :param loss_mask: (batch, at least num_tokens), 0 for tokens that shall not count, or None
    :return: (batch, num_tokens), bool; None if every token counts
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        return None
    names = list(inspect.signature(block.forward).parameters)
    attention_mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
    mask = token_mask(attention_mask, hidden.shape[1])
    if loss_mask is None:
        return mask
    counts = loss_mask[:, : hidden.shape[1]].bool().to(hidden.device)
    return counts if mask is None else mask & counts


def content_key(hidden: Tensor, mask: Tensor | None) -> bytes:
    """
    A key of a tensor's content. Samples are sorted by that of their hidden states, so that the
    order in which the pipeline delivered them does not count; neither does what is in padding.
    """
    real = hidden if mask is None else hidden[mask]
    data = real.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()


def fingerprint(hidden: Tensor) -> int:
    """An exact, order-independent checksum: equal tensors have equal fingerprints."""
    return int(hidden.contiguous().view(torch.uint8).sum(dtype=torch.int64))


def stackable(
    indices: list[int], signature: Callable[[int], tuple[Any, ...]]
) -> Iterator[list[int]]:
    """Yield ``indices`` in groups of equal ``signature``, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in indices:
        groups.setdefault(signature(index), []).append(index)
    yield from groups.values()


def stack_masks(masks: list[Tensor | None], indices: list[int], like: Tensor) -> Tensor | None:
    """
    :param masks: (1, tokens) bool per sample, None where every token counts
    :param indices: the samples to stack
    :param like: (len(indices), tokens, ...), for length and device
    :return: (len(indices), tokens), bool; None if every token counts
    """
    if all(masks[index] is None for index in indices):
        return None
    full = like.new_ones(1, like.shape[1], dtype=torch.bool)
    rows = [full if (mask := masks[index]) is None else mask.to(like.device) for index in indices]
    return torch.cat(rows)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        # What is not per sample is passed on once for the whole batch, so it must be the same.
        return tuple(value.shape) if _per_sample(value) else content_key(value, None)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _stack(leaves: list[Any], device: torch.device) -> Any:
    """Join one argument of several samples: tensors of a batch along it, anything else as it is."""
    first = leaves[0]
    if not isinstance(first, Tensor):
        return first
    return (torch.cat(leaves) if _per_sample(first) else first).to(device)


def _per_sample(value: Tensor) -> bool:
    return value.ndim > 1 and value.shape[0] == 1
