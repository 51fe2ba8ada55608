"""One calibration sample as a block saw it, and how samples are stacked into a batch."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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

from autoround_modifier.blocks.argument_objects import put_together

__all__ = [
    "BlockCall",
    "as_samples",
    "call_token_mask",
    "content_key",
    "fingerprint",
    "input_hidden",
    "output_hidden",
    "sample_key",
    "sample_part",
    "split_call",
    "stack_masks",
    "stackable",
    "token_mask",
]

# Under which blocks take their hidden states, where not by position
_HIDDEN_NAMES = ("hidden_states", "hidden_state")
_MROPE_POSITIONS = 3


@dataclass
class BlockCall:
    """
    The arguments of one block call for one sample, without its hidden states.

    :param args: positional arguments after the hidden states
    :param kwargs: keyword arguments; tensors of a batch are cut to this sample, (1, ...)
    :param hidden_name: name under which the hidden states were passed; None if positional
    :param shape: of the hidden states, where the block does not take (batch, tokens, hidden);
        such a call is one sample, whole, and is never stacked with others
    :param written: tensors that the block wrote into its arguments, by their place there,
        `tensors_by_place`, where a later block may read them; this sample's part of each
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None = None
    shape: torch.Size | None = None
    written: dict[str, Tensor] = field(default_factory=dict)

    def signature(self, hidden: Tensor) -> tuple[Any, ...] | None:
        """:return: what two samples must share to be stacked into one batch; None to stay alone"""
        if self.shape is not None or self._arguments_signature is None:
            return None
        return (tuple(hidden.shape[1:]), *self._arguments_signature)

    @cached_property
    def _arguments_signature(self) -> tuple[Any, ...] | None:
        leaves, structure = tree_flatten((self.args, self.kwargs))
        if any(isinstance(leaf, Tensor) and _stays_alone(leaf) for leaf in leaves):
            return None
        return (str(structure), *map(_describe, leaves))

    def tensors(self) -> list[Tensor]:
        """:return: those among the arguments"""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def exchanged(self, instead: Callable[[Tensor], Tensor]) -> BlockCall:
        """
        :param instead: gives the tensor to use for one of the arguments; it may be the same
        :return: the call with these arguments
        """

        def exchange(value: Any) -> Any:
            return instead(value) if isinstance(value, Tensor) else value

        args, kwargs = tree_map(exchange, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    @staticmethod
    def stack(calls: list[BlockCall], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """
        :param calls: calls of equal `signature`; one where that is None
        :param hidden: (len(calls), tokens, hidden)
        :return: args and kwargs of one call of the block for all samples, on the device of
            ``hidden``; apart from ``hidden``, copies, into which the block may write
        """
        if calls[0].shape is not None:
            hidden = hidden.view(calls[0].shape)
        flat = [tree_leaves((call.args, call.kwargs)) for call in calls]
        leaves = [_stack(list(column), hidden.device) for column in zip(*flat, strict=True)]
        structure = tree_structure((calls[0].args, calls[0].kwargs))
        args, kwargs = put_together(tree_unflatten(leaves, structure))
        if calls[0].hidden_name is None:
            return (hidden, *args), kwargs
        return args, {**kwargs, calls[0].hidden_name: hidden}


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, BlockCall]]:
    """
    Cut one block call into its samples. Hidden states that are not (batch, tokens, hidden) belong
    to one sample: the patches of all images (Qwen2-VL's vision tower), or several streams of one
    text (Gemma 3n).

    :return: hidden states (1, tokens, hidden) and the rest of the call, one pair per sample
    :raises ValueError: if the call has no hidden states to tune on
    """
    hidden, name = _find_hidden(args, kwargs)
    if hidden is None:
        raise ValueError(
            "it is called without a tensor as first argument and without `hidden_states`"
        )
    if name is None:
        args = args[1:]
    else:
        kwargs = {key: value for key, value in kwargs.items() if key != name}

    if hidden.ndim != 3:
        return [(as_samples(hidden), BlockCall(args, kwargs, name, hidden.shape))]
    batch = hidden.shape[0]

    def row(index: int, value: Any) -> Any:
        return sample_part(value, index, batch) if isinstance(value, Tensor) else value

    samples = []
    for index in range(batch):
        call_args, call_kwargs = tree_map(partial(row, index), (args, kwargs))
        samples.append((hidden[index : index + 1], BlockCall(call_args, call_kwargs, name)))
    return samples


def sample_part(value: Tensor, index: int, batch: int) -> Tensor:
    """
    :param value: an argument of a call
    :param index: of the sample in the batch
    :param batch: number of samples of the call
    :return: the part of the argument that belongs to the sample; all where it is of all samples
    """
    axis = None if batch == 1 else _batch_axis(value, batch)
    return value if axis is None else value.narrow(axis, index, 1)


def _find_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, str | None]:
    """:return: the hidden states of a block call, and their name; None for the name by position"""
    if args and isinstance(args[0], Tensor):
        return args[0], None
    for name in _HIDDEN_NAMES:
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name], name
    return None, None


def input_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """:return: the hidden states with which a block was called, as it received them, or None"""
    return _find_hidden(args, kwargs)[0]


def output_hidden(output: Any) -> Tensor:
    """:return: the hidden states in what a decoder block returns, as the block returns them"""
    return output[0] if isinstance(output, (tuple, list)) else output


def as_samples(hidden: Tensor) -> Tensor:
    """
    :param hidden: hidden states as a block takes or returns them
    :return: (batch, tokens, hidden); (1, tokens, hidden) where they have another number of
        dimensions, see `split_call`
    """
    return hidden if hidden.ndim == 3 else hidden.reshape(1, -1, hidden.shape[-1])


def token_mask(attention_mask: Any, num_tokens: int) -> Tensor | None:
    """
    Which tokens are real, read off the attention mask a block was given.

    A causal mask lets a token attend to itself exactly if it is not padding, so the diagonal of
    a four-dimensional mask is the token mask, for left and right padding and sliding windows.

    :param attention_mask: (batch, heads or 1, num_tokens, num_tokens), additive, bool or integers,
        or (batch, num_tokens); anything else has nothing to say
    :return: (batch, num_tokens), bool; None if every token is real
    """
    mask = attention_mask
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4 and mask.shape[-1] == mask.shape[-2] == num_tokens:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        mask = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
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
    hidden = input_hidden(args, kwargs)
    if hidden is None or hidden.ndim != 3:
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


def sample_key(hidden: Tensor, mask: Tensor | None, ids: Tensor | None) -> bytes:
    """
    :param hidden: (1, tokens, hidden), what the first block sees of a sample
    :param mask: (1, tokens), bool, False for tokens that do not count, or None
    :param ids: (1, tokens), int64: token ids of the sample, where they shall be its key, because
        its hidden states have other bits on another device; or None
    :return: key of the sample; that of its hidden states decides between samples of equal text
    """
    key = content_key(hidden, mask)
    if ids is None:
        return key
    return content_key(ids, None if mask is None else mask.cpu()) + key


def fingerprint(hidden: Tensor) -> int:
    """
    The sum of a tensor's bytes, read as 64-bit integers, computed on its device: equal tensors have
    equal fingerprints, in whatever order the sum is computed.
    """
    data = hidden.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # integers must start at a multiple of their size
    rest = data.numel() % 8
    words, last = data[: data.numel() - rest].view(torch.int64), data[data.numel() - rest :]
    # the sum wraps around, and so does the sum of parts of it
    return int(words.sum() + last.sum(dtype=torch.int64))


def stackable(
    indices: list[int], signature: Callable[[int], tuple[Any, ...] | None]
) -> Iterator[list[int]]:
    """
    Yield ``indices`` in groups of equal ``signature``, in order of first appearance. An index
    without a signature forms its own group, even if it appears twice.
    """
    groups: dict[Any, list[int]] = {}
    for position, index in enumerate(indices):
        key = signature(index)
        groups.setdefault(position if key is None else key, []).append(index)
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
        per_sample = _batch_axis(value, 1) is not None
        return tuple(value.shape) if per_sample else content_key(value, None)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _stack(leaves: list[Any], device: torch.device) -> Any:
    """
    Join one argument of several samples, in new memory: tensors of a batch along it, other tensors
    from the first sample, anything else as it is.
    """
    first = leaves[0]
    if not isinstance(first, Tensor):
        return first
    axis = _batch_axis(first, 1)
    if axis is None:
        return first.to(device, copy=True)
    return torch.cat([leaf.to(device) for leaf in leaves], axis)


def _batch_axis(value: Tensor, batch: int) -> int | None:
    """
    :return: the dimension that counts samples; None if there is none. It is the first, but the
        second of the positions that vision-language models count three times, for time, height
        and width: (3, batch, tokens, ...)
    """
    if value.ndim > 2 and value.shape[0] == _MROPE_POSITIONS and value.shape[1] == batch:
        return 1
    return 0 if value.ndim > 1 and value.shape[0] == batch else None


def _stays_alone(value: Tensor) -> bool:
    """
    :return: whether a tensor belongs to one sample, in a form that does not show how to join it
        with those of others, like Mllama's images (tiles, patches, hidden)
    """
    return value.ndim > 2 and _batch_axis(value, 1) is None
