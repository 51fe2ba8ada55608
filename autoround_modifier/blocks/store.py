"""What each block saw in the full-precision pass: inputs, outputs, arguments and token masks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoround_modifier.blocks.samples import (
    BlockCall,
    as_samples,
    content_key,
    output_hidden,
    split_call,
)
from autoround_modifier.errors import CalibrationError, NonFiniteError
from autoround_modifier.parallel import gathered, process_rank

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


@dataclass(frozen=True)
class SampleOrder:
    """
    Which samples are used.

    :param indices: of those of this process, as they were recorded
    :param positions: of each among the samples of all processes, ascending
    :param digest: of all samples that were recorded, used or not
    """

    indices: list[int]
    positions: list[int]
    digest: bytes


@dataclass
class BlockSamples:
    """
    All samples of one block, in the pipeline's order.

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

    def select(self, order: SampleOrder) -> None:
        """Keep some samples, in that order."""
        self.positions, self.digest = order.positions, order.digest
        for name in ("inputs", "outputs", "calls", "masks"):
            values = getattr(self, name)
            if values:
                setattr(self, name, [values[index] for index in order.indices])


class CalibrationStore:
    """
    Forward hooks that record what blocks see, one sample per row of each batch.

    The first block of a module list that is taken out fixes which samples are used and in which
    order: sorted by content, the first ``num_samples`` of them. So no result depends on the
    pipeline's order. Each module list has its own samples: the blocks of a vision encoder may see
    all images of a batch at once.

    :param names: name of each block that is recorded
    :param num_samples: largest number of samples to keep; None for all
    :param offload_device: where captured tensors are kept
    :param keep_outputs: false where nobody needs them
    :param sort: false keeps the pipeline's order, and all samples
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        num_samples: int | None,
        offload_device: torch.device | str = "cpu",
        keep_outputs: bool = True,
        sort: bool = True,
    ):
        self.names = names
        self.num_samples = num_samples
        self.keep_outputs = keep_outputs
        self.offload_device = offload_device
        self.sort = sort
        self._num_recorded: dict[str, int] = {}  # by module list
        self._orders: dict[str, SampleOrder] = {}
        self._blocks: dict[nn.Module, BlockSamples] = {}

    @torch.no_grad()
    def record(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        token_mask: Tensor | None = None,
    ) -> None:
        """
        Record one call of a block.

        :param token_mask: (batch, tokens), bool, False for tokens that shall not count
        :raises NonFiniteError: if the output holds NaN or infinity
        """
        captured = self._blocks.setdefault(block, BlockSamples())
        offload = self._offload
        outputs = as_samples(output_hidden(output))
        for row, (hidden, call) in enumerate(split_call(args, kwargs)):
            out = outputs[row : row + 1]
            mask = None if token_mask is None else token_mask[row : row + 1]
            real = out if mask is None else out[mask]
            if not torch.isfinite(real).all():
                raise NonFiniteError(
                    f"{self.names[block]}: the full-precision output has NaN or infinity in "
                    f"calibration sample {len(captured.inputs)}. Check the weights of this block "
                    "and the calibration text, or load the model in bfloat16 or float32."
                )
            captured.inputs.append(offload(hidden))
            if self.keep_outputs:
                captured.outputs.append(offload(out))
            captured.calls.append(
                replace(
                    call, args=tree_map(offload, call.args), kwargs=tree_map(offload, call.kwargs)
                )
            )
            captured.masks.append(None if mask is None else offload(mask))

    def recorded(self) -> list[nn.Module]:
        """:return: the blocks that ran since they were last taken out, in the order they ended"""
        return list(self._blocks)

    def pop(self, block: nn.Module) -> BlockSamples | None:
        """
        :return: what was recorded for a block, in canonical order; None if it did not run, or not
            once for each sample of its module list
        """
        captured = self._blocks.pop(block, None)
        if captured is None:
            return None
        name = module_list(self.names[block])
        if len(captured.inputs) != self._num_recorded.setdefault(name, len(captured.inputs)):
            return None
        if self.sort:
            if name not in self._orders:
                self._orders[name] = self._canonical_order(captured)
            captured.select(self._orders[name])
        return captured

    def clear(self) -> None:
        """Drop what was recorded."""
        self._blocks.clear()

    def _canonical_order(self, captured: BlockSamples) -> SampleOrder:
        keys = [
            content_key(hidden, mask)
            for hidden, mask in zip(captured.inputs, captured.masks, strict=True)
        ]
        shares = gathered(keys)
        # The input of some module lists is a constant, the same in all samples.
        varied = len(shares) > 1 and len(set(keys)) > 1
        if varied and all(sorted(share) == sorted(keys) for share in shares):
            raise CalibrationError(
                "all processes were given the same calibration samples; give each its share, as by "
                "`llmcompressor.datasets.get_rank_partition`, or use `autoround_modifier.oneshot`"
            )
        everywhere = [
            (key, rank, index)
            for rank, share in enumerate(shares)
            for index, key in enumerate(share)
        ]
        rank, _ = process_rank()
        chosen = enumerate(sorted(everywhere)[: self.num_samples])
        mine = [(position, index) for position, (_, owner, index) in chosen if owner == rank]
        digest = hashlib.blake2b(b"".join(key for key, _, _ in sorted(everywhere)), digest_size=16)
        return SampleOrder(
            [index for _, index in mine], [position for position, _ in mine], digest.digest()
        )

    def _offload(self, value: Any) -> Any:
        return value.detach().to(self.offload_device) if isinstance(value, Tensor) else value
