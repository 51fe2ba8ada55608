"""What each block saw in the full-precision pass: inputs, outputs, arguments and token masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.argument_objects import take_apart, tensors_by_place
from autoround_modifier.blocks.kept_tensors import KeptTensors, version_of
from autoround_modifier.blocks.placement import SamplePlacement
from autoround_modifier.blocks.samples import (
    BlockCall,
    as_samples,
    input_hidden,
    output_hidden,
    sample_key,
    sample_part,
    split_call,
)
from autoround_modifier.blocks.selection import SampleSelection
from autoround_modifier.device import mark_memory, peak_since_mark
from autoround_modifier.errors import NonFiniteError, RecipeError

__all__ = ["BlockSamples", "CalibrationStore", "module_list", "split_by_module_list"]


def module_list(name: str) -> str:
    """
    :param name: of a block, ``model.language_model.layers.3``
    :return: the name of the module list that holds it, ``model.language_model.layers``; its blocks
        run one after the other
    """
    stem = re.split(r"\.\d+(?:\.|$)", name, maxsplit=1)[0]
    return stem if stem != name else name.rpartition(".")[0]


def split_by_module_list(
    blocks: Iterable[nn.Module], names: dict[nn.Module, str]
) -> list[list[nn.Module]]:
    """:return: the blocks in their order, in one list for each `module_list`"""
    lists: dict[str, list[nn.Module]] = {}
    for block in blocks:
        lists.setdefault(module_list(names[block]), []).append(block)
    return list(lists.values())


@dataclass
class BlockSamples:
    """
    The samples of one block that are used, in the order of their content.

    :ivar inputs: full-precision hidden states, (1, tokens, hidden) each
    :ivar outputs: full-precision outputs, same shapes: the targets of tuning
    :ivar calls: the other arguments of each call
    :ivar masks: (1, tokens) bool each, False for tokens that do not count; None if all count
    :ivar positions: of each among the samples of all processes
    :ivar digest: of all samples that were recorded, also of those that are not used
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    digest: bytes = b""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; of what samples share, once."""
        tensors = [*self.inputs, *self.outputs, *(x for x in self.masks if x is not None)]
        tensors += [x for call in self.calls for x in call.tensors()]
        return sum({id(x): x.nbytes for x in tensors}.values())


@dataclass
class _Sample:
    hidden: Tensor
    call: BlockCall
    mask: Tensor | None
    output: Tensor | None = None


@dataclass
class _Recording:
    """
    :ivar num_samples: that the block ran on
    :ivar samples: that are kept, by their index among those
    """

    num_samples: int = 0
    samples: dict[int, _Sample] = field(default_factory=dict)


@dataclass
class _OpenCall:
    """
    A call of a block that has begun.

    :ivar args: of the call, as the block received them, like ``kwargs``
    :ivar tensors: in the arguments when the call began, with their versions, by their place
    :ivar batch: number of samples
    :ivar token_mask: (batch, tokens), bool, False for tokens that do not count; None if all count
    :ivar samples: that are kept, by their index among all of the block
    :ivar keys: of the content of all samples, where they decide which are used
    :ivar held: bytes of the accelerator that tensors held before the block ran
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, tuple[Tensor, int | None]]
    batch: int
    token_mask: Tensor | None
    samples: dict[int, _Sample]
    keys: list[bytes]
    held: int = 0


class CalibrationStore:
    """
    Records what blocks see, one sample per row of each batch.

    The block of a module list that runs first decides which samples are used and in which order:
    sorted by content, the first ``num_samples`` of them. So no result depends on the pipeline's
    order. Of other samples nothing is kept. The n-th sample of one block is the n-th of each other
    block of its module list. Each module list has its own samples: the blocks of a vision encoder
    may see all images of a batch at once.

    :param names: name of each block that is recorded
    :param num_samples: largest number of samples to keep; None for all
    :param placement: decides where captured tensors are kept; None for the host
    :param keep_outputs: false where nobody needs them, nor what blocks write into their arguments
    :param sort: false keeps the pipeline's order, and all samples
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        num_samples: int | None,
        placement: SamplePlacement | None = None,
        keep_outputs: bool = True,
        sort: bool = True,
    ):
        self.names = names
        self.num_samples = num_samples
        self.keep_outputs = keep_outputs
        self.sort = sort
        self._lists = {block: module_list(name) for block, name in names.items()}
        self.placement = placement or SamplePlacement()
        self._tensors = KeptTensors()
        self._devices: dict[nn.Module, torch.device] = {}  # where the samples of a block are kept
        self._first: dict[str, nn.Module] = {}  # the block that decides, by module list
        self._selections: dict[str, SampleSelection] = {}
        self._num_recorded: dict[str, int] = {}  # by module list
        self._open: dict[nn.Module, _OpenCall] = {}
        self._recordings: dict[nn.Module, _Recording] = {}

    @torch.no_grad()
    def enter(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        token_mask: Tensor | None = None,
        token_ids: Callable[[Tensor], Tensor | None] = lambda hidden: None,
    ) -> None:
        """
        Record what a block is called with, before it runs: it may write into its arguments.

        :param token_mask: (batch, tokens), bool, False for tokens that shall not count
        :param token_ids: gives the token ids by which samples are recognised, (batch, tokens), for
            the hidden states of the first block; None where those themselves will do
        :raises RecipeError: if the block takes no hidden states
        """
        self._tensors.next_call()
        name = self._lists[block]
        selection = self._selections.setdefault(name, SampleSelection(self.num_samples))
        decides = (
            self.sort and selection.order is None and self._first.setdefault(name, block) is block
        )
        start = self._recordings.get(block, _Recording()).num_samples
        try:
            rows = split_call(*take_apart((args, kwargs)))
        except ValueError as error:
            raise RecipeError(
                f"{self.names[block]} ({type(block).__name__}) is no block that can be tuned: "
                f"{error}. Name the class of the others in `sequential_targets` of `oneshot`."
            ) from error
        call = _OpenCall(args, kwargs, {}, len(rows), token_mask, {}, [])
        if self.keep_outputs:
            tensors = tensors_by_place((args, kwargs))
            call.tensors = {place: (x, version_of(x)) for place, x in tensors.items()}
        whole = input_hidden(args, kwargs)
        assert whole is not None  # `split_call` has found it
        if block not in self._devices:
            self._devices[block] = self.placement.choose(block, name, whole.device)
        keep = partial(self._tensors.keep, device=self._devices[block])
        keep_equal = partial(keep, merge=True)
        ids = token_ids(whole) if decides else None
        for row, (hidden, arguments) in enumerate(rows):
            if self.sort and not selection.may_select(start + row):
                continue
            mask = None if token_mask is None else keep_equal(token_mask[row : row + 1])
            sample = _Sample(keep(hidden), arguments.exchanged(keep_equal), mask)
            call.samples[start + row] = sample
            if decides:
                own_ids = None if ids is None else ids[row : row + 1]
                call.keys.append(sample_key(sample.hidden, mask, own_ids))
        self._open[block] = call
        call.held = mark_memory()

    @torch.no_grad()
    def leave(self, block: nn.Module, output: Any) -> None:
        """
        Record what a block gave, after the `enter` of the same call.

        :raises NonFiniteError: if the output holds NaN or infinity
        """
        call = self._open.pop(block)
        self.placement.called(peak_since_mark() - call.held)
        recording = self._recordings.setdefault(block, _Recording())
        start = recording.num_samples
        outputs = as_samples(output_hidden(output))
        for row in range(call.batch):
            real = outputs[row] if call.token_mask is None else outputs[row][call.token_mask[row]]
            if not torch.isfinite(real).all():
                raise NonFiniteError(
                    f"{self.names[block]}: the full-precision output has NaN or infinity in "
                    f"calibration sample {start + row}. Check the weights of this block "
                    "and the calibration text, or load the model in bfloat16 or float32."
                )
        recording.num_samples += call.batch
        recording.samples.update(call.samples)
        for key in call.keys:
            dropped = self._selections[self._lists[block]].add(key)
            if dropped is not None:
                self._drop(self._lists[block], dropped)
        if not self.keep_outputs:
            return
        written = self._written(call)
        keep = partial(self._tensors.keep, device=self._devices[block])
        for index, sample in call.samples.items():
            if index not in recording.samples:
                continue
            row = index - start
            sample.output = keep(outputs[row : row + 1])
            # A later block finds these tensors among its arguments. What is kept of them then is
            # the same, because the owner of both is.
            sample.call.written = {
                place: keep(sample_part(x, row, call.batch), with_owner=True)
                for place, x in written.items()
            }

    def recorded(self) -> list[nn.Module]:
        """:return: the blocks that ran since they were last taken out, in the order they ended"""
        return list(self._recordings)

    def pop(self, block: nn.Module) -> BlockSamples | None:
        """
        :return: what was recorded for a block, in canonical order; None if it did not run, or not
            once for each sample of its module list
        """
        self._tensors.release()
        self._devices.pop(block, None)
        recording = self._recordings.pop(block, None)
        if recording is None:
            return None
        name = self._lists[block]
        result = BlockSamples()
        indices: Iterable[int] = recording.samples
        if self.sort:
            order = self._selections[name].decide()
            indices, result.positions, result.digest = order.indices, order.positions, order.digest
            num_samples = len(self._selections[name])
        else:
            num_samples = self._num_recorded.setdefault(name, recording.num_samples)
        if recording.num_samples != num_samples:
            return None
        for sample in (recording.samples[index] for index in indices):
            result.inputs.append(sample.hidden)
            result.calls.append(sample.call)
            result.masks.append(sample.mask)
            if sample.output is not None:
                result.outputs.append(sample.output)
        self.placement.recorded(name, result.nbytes)
        return result

    def clear(self) -> None:
        """Drop what was recorded."""
        self._open.clear()
        self._recordings.clear()
        self._devices.clear()
        self._tensors.release()

    def _drop(self, name: str, index: int) -> None:
        """Forget a sample of all blocks of a module list."""
        for block, recording in self._recordings.items():
            if self._lists[block] == name:
                recording.samples.pop(index, None)

    def _written(self, call: _OpenCall) -> dict[str, Tensor]:
        """:return: the tensors in a call's arguments that were not there when it began"""
        hidden = input_hidden(call.args, call.kwargs)

        def is_new(place: str, tensor: Tensor) -> bool:
            before, version = call.tensors.get(place, (None, None))
            return tensor is not before or version_of(tensor) != version

        after = tensors_by_place((call.args, call.kwargs))
        return {x: y for x, y in after.items() if y is not hidden and is_new(x, y)}
