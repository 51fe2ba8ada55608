"""Runs one or several consecutive blocks on captured calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from autoround_modifier.activations import ActivationQuantizer
from autoround_modifier.blocks.argument_objects import tensors_by_place
from autoround_modifier.blocks.causal import without_causal_masks
from autoround_modifier.blocks.forwards import Forward
from autoround_modifier.blocks.patching import forwards_replaced, hooks_registered
from autoround_modifier.blocks.samples import (
    BlockCall,
    as_samples,
    output_hidden,
    sample_part,
    stack_masks,
    stackable,
)
from autoround_modifier.errors import CalibrationError
from autoround_modifier.host.layers import parameters_frozen
from autoround_modifier.parallel import gathered

__all__ = ["BlockGroup"]

# Share of what a block adds to the hidden states by which two attention kernels may differ. Without
# causal attention it is many times that.
ROUNDING = 0.02


class BlockGroup:
    """
    Consecutive blocks that are tuned together, and the calls they received.

    :param blocks: in the order in which they run
    :param calls: for each block, the arguments of its call for each sample
    :param activations: that are quantized within the blocks
    :param written: what earlier quantized blocks wrote into arguments, by the tensors in ``calls``
        that have the same from the full-precision blocks; it takes their place
    :ivar writes: whether the blocks write into their arguments what a later block may read
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        calls: list[list[BlockCall]],
        activations: Iterable[ActivationQuantizer] = (),
        written: Mapping[Tensor, Tensor] | None = None,
    ):
        self.blocks = blocks
        self.calls = calls
        self.activations = list(activations)
        self.written: Mapping[Tensor, Tensor] = {} if written is None else written
        self.writes = any(call.written for block_calls in calls for call in block_calls)
        first = next(blocks[0].parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device

    def forward(self, hidden: Tensor, samples: list[int]) -> Tensor:
        """
        :param hidden: (len(samples), tokens, hidden), the input of the first block
        :param samples: which samples these are; all of one signature
        :return: output of the last block, same shape
        :raises CalibrationError: if a block does not run again on what it was called with
        """
        return self._run(hidden, samples)[0]

    def _run(self, hidden: Tensor, samples: list[int]) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """
        :return: `forward`; and what the blocks wrote into their arguments, by the tensors that hold
            the same in the recorded calls
        """
        written: dict[Tensor, Tensor] = {}

        def instead(recorded: Tensor) -> Tensor:
            now = written.get(recorded)
            return self.written.get(recorded, recorded) if now is None else now

        for block, calls in zip(self.blocks, self.calls, strict=True):
            rows = [calls[index] for index in samples]
            if written or self.written:
                rows = [call.exchanged(instead) for call in rows]
            args, kwargs = BlockCall.stack(rows, hidden)
            with _naming(block, len(rows)):
                output = block(*args, **kwargs)
            hidden = as_samples(output_hidden(output))
            if not any(call.written for call in rows):
                continue
            after = tensors_by_place((args, kwargs))
            for row, call in enumerate(rows):
                for place, recorded in call.written.items():
                    if place in after:
                        written[recorded] = sample_part(after[place], row, len(rows))
        return hidden, written

    @torch.no_grad()
    def leave_out_causal_masks(self, hidden: list[Tensor]) -> bool:
        """
        Call the blocks without attention masks, if all samples of all processes have one that hides
        the future alone, and the shortest and the longest of them give the same without.

        :param hidden: (1, tokens, hidden) per sample, the input of the first block
        :return: whether they are left out
        """
        shorter = [without_causal_masks(calls) for calls in self.calls]
        found = [calls for calls in shorter if calls is not None]
        lengths = {x.shape[1]: index for index, x in enumerate(hidden)}
        tried = {lengths[length] for length in (min(lengths), max(lengths))} if lengths else ()
        possible = len(found) == len(shorter) and all(
            self._computes_the_same(found, hidden[index], index) for index in tried
        )
        if not all(gathered(possible)):
            return False
        self.calls = found
        return True

    def _computes_the_same(
        self, other_calls: list[list[BlockCall]], hidden: Tensor, index: int
    ) -> bool:
        """:return: whether a sample gives the same with other arguments, but for rounding"""
        calls = self.calls

        def output() -> Tensor:  # a block may write into its input
            return self.forward(hidden.to(self.device, copy=True), [index]).float()

        expected = output()
        try:
            self.calls = other_calls
            difference = torch.dist(output(), expected)
        except CalibrationError:  # it needs what is left out
            return False
        finally:
            self.calls = calls
        added = torch.dist(expected, hidden.to(self.device).float())
        return bool(difference <= ROUNDING * added)

    def move_calls(self, device: torch.device) -> None:
        """
        Keep the arguments of all calls on a device, and once what samples share. Those that blocks
        write into stay where they are: a later block is known to read them by their identity.
        """
        if self.writes or self.written:
            return
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, which keeps its id

        def on_device(tensor: Tensor) -> Tensor:
            return moved.setdefault(id(tensor), (tensor, tensor.to(device)))[1]

        self.calls = [[call.exchanged(on_device) for call in calls] for calls in self.calls]

    def stackable(self, hidden: list[Tensor], samples: list[int]) -> list[list[int]]:
        """:return: the samples, those together that one call of the blocks can take"""

        def signature(index: int) -> tuple | None:
            parts = [calls[index].signature(hidden[index]) for calls in self.calls]
            return None if None in parts else tuple(parts)

        return list(stackable(samples, signature))

    def microbatches(
        self, hidden: list[Tensor], samples: list[int]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield `stackable` samples, with their stacked hidden states on the device."""
        for group in self.stackable(hidden, samples):
            yield group, torch.cat([hidden[index].to(self.device) for index in group])

    def batches(self, hidden: list[Tensor], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield `microbatches` of all samples, in order."""
        for start in range(0, len(hidden), batch_size):
            samples = list(range(start, min(start + batch_size, len(hidden))))
            yield from self.microbatches(hidden, samples)

    @torch.no_grad()
    def calibrate_activations(
        self,
        hidden: list[Tensor],
        masks: list[Tensor | None],
        batch_size: int,
        forwards: dict[nn.Module, Forward],
    ) -> None:
        """
        Find the static scales of activations, on what the blocks will see.

        :param hidden: (1, tokens, hidden) per sample, the input of the first block
        :param masks: (1, tokens) bool per sample, None where every token counts
        :param forwards: what layers compute in place of their own
        """
        static = [one for one in self.activations if one.statistics is not None]
        if not static:
            return
        mask: Tensor | None = None

        def recorder(one: ActivationQuantizer) -> Callable[[Tensor], None]:
            return lambda x: one.record(x, mask)

        hooks = [
            partial(one.register, one.quantize if one.statistics is None else recorder(one))
            for one in self.activations
        ]
        with forwards_replaced(forwards), hooks_registered(*hooks):
            for one in static:
                assert one.statistics is not None
                one.statistics.restart()  # until now it recorded the full-precision model
            for indices, stacked in self.batches(hidden, batch_size):
                mask = stack_masks(masks, indices, stacked)
                self.forward(stacked, indices)
        for one in static:
            one.synchronize()
            if one.statistics is not None and one.statistics.found:
                one.calibrate()

    @torch.no_grad()
    def advance(
        self,
        hidden: list[Tensor],
        batch_size: int,
        forwards: dict[nn.Module, Forward],
        device: torch.device | None = None,
    ) -> dict[Tensor, Tensor]:
        """
        Replace the input of the first block by the output of the last one, sample by sample, so
        that only one of the two is in memory.

        :param hidden: (1, tokens, hidden) per sample
        :param forwards: what layers compute in place of their own
        :param device: where the outputs are kept; None for the devices of the inputs
        :return: what the blocks wrote into their arguments, by the tensors that hold the same from
            the full-precision blocks, on the devices of these
        """
        everything: dict[Tensor, Tensor] = {}
        with self.quantized(forwards):
            for indices, stacked in self.batches(hidden, batch_size):
                outputs, written = self._run(stacked, indices)
                # copies: a view would keep the whole batch
                for index, row in zip(indices, outputs, strict=True):
                    hidden[index] = row.unsqueeze(0).to(device or hidden[index].device, copy=True)
                for recorded, tensor in written.items():
                    everything[recorded] = tensor.to(recorded.device, copy=True)
        return everything

    @contextmanager
    def quantized(self, forwards: dict[nn.Module, Forward]) -> Iterator[None]:
        """
        Let linear layers compute otherwise, and with quantized activations. Gradients flow through
        both.
        """
        hooks = [partial(one.register, one.quantize) for one in self.activations]
        with forwards_replaced(forwards), hooks_registered(*hooks):
            yield

    def frozen(self) -> AbstractContextManager[None]:
        """No gradients for the parameters of the blocks; only tuned values are trained."""
        return parameters_frozen(self.blocks)


@contextmanager
def _naming(block: nn.Module, num_samples: int) -> Iterator[None]:
    """Say which block failed on recorded arguments; not where memory is short."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if type(error).__module__ == CalibrationError.__module__:
            raise  # it says what is wrong already
        alone = (
            " It may not know that several samples were joined: try `batch_size: 1`."
            if num_samples > 1
            else ""
        )
        raise CalibrationError(
            f"{type(block).__name__} ran in the calibration pass, and fails when it runs again on "
            f"the same arguments, to be tuned ({type(error).__name__}: {error}).{alone} Without "
            "tuning (`preset: opt_rtn`) it does not have to."
        ) from error
