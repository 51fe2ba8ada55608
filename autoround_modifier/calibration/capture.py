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

from autoround_modifier.calibration.samples import (
    BlockCall,
    as_samples,
    content_key,
    output_hidden,
    split_call,
)
from autoround_modifier.distributed import gathered, process_rank
from autoround_modifier.errors import CalibrationError, NonFiniteError

__all__ = ["BlockCapture", "CapturedBlock", "ImportanceCapture", "split_towers", "tower"]


def tower(name: str) -> str:
    """
    :param name: of a block, ``model.language_model.layers.3``
    :return: what the blocks that run one after the other have in common,
        ``model.language_model.layers``
    """
    stem = re.split(r"\.\d+(?:\.|$)", name, maxsplit=1)[0]
    return stem if stem != name else name.rpartition(".")[0]


def split_towers(blocks: Iterable[nn.Module], names: dict[nn.Module, str]) -> list[list[nn.Module]]:
    """:return: the blocks in their order, in one list for each `tower`"""
    towers: dict[str, list[nn.Module]] = {}
    for block in blocks:
        towers.setdefault(tower(names[block]), []).append(block)
    return list(towers.values())


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
class CapturedBlock:
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


class BlockCapture:
    """
    Forward hooks that record what blocks see, one sample per row of each batch.

    The first block of a tower that is taken out fixes which samples are used and in which order:
    sorted by content, the first ``num_samples`` of them. So no result depends on the pipeline's
    order. Each tower has its own samples: a vision tower may see all images of a batch at once.

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
        self._num_recorded: dict[str, int] = {}  # by tower
        self._orders: dict[str, SampleOrder] = {}
        self._blocks: dict[nn.Module, CapturedBlock] = {}

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
        captured = self._blocks.setdefault(block, CapturedBlock())
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

    def pop(self, block: nn.Module) -> CapturedBlock | None:
        """
        :return: what was recorded for a block, in canonical order; None if it did not run, or not
            once for each sample of its tower
        """
        captured = self._blocks.pop(block, None)
        if captured is None:
            return None
        name = tower(self.names[block])
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

    def _canonical_order(self, captured: CapturedBlock) -> SampleOrder:
        keys = [
            content_key(hidden, mask)
            for hidden, mask in zip(captured.inputs, captured.masks, strict=True)
        ]
        shares = gathered(keys)
        # The input of some towers is a constant, the same in all samples.
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


class ImportanceCapture:
    """
    Sums ``x_j^2`` per input channel of each layer over all calibration tokens: the importance
    h_j of SignRoundV2 (https://arxiv.org/abs/2512.04746).
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._num_tokens: dict[nn.Module, int] = {}

    @torch.no_grad()
    def record(self, layer: nn.Module, x: Tensor, token_mask: Tensor | None = None) -> None:
        """
        Add one batch of inputs, (..., in_features).

        :param token_mask: (batch, tokens), bool, False for tokens that shall not count; without
            effect on layers that see tokens in another arrangement, such as routed experts
        """
        if not x.is_floating_point():
            return
        if token_mask is not None and x.shape[:-1] == token_mask.shape:
            x = x[token_mask]
        # float64, so that the order of the batches does not show in the result
        tokens = x.detach().flatten(0, -2)
        squares = tokens.float().square().sum(0).double()
        self._sums[layer] = self._sums[layer] + squares if layer in self._sums else squares
        self._num_tokens[layer] = self._num_tokens.get(layer, 0) + len(tokens)

    def copy(self) -> ImportanceCapture:
        """:return: the same record; what is taken out of it stays in this one"""
        other = ImportanceCapture()
        other._sums, other._num_tokens = dict(self._sums), dict(self._num_tokens)
        return other

    def pop(self, layer: nn.Module) -> Tensor | None:
        """:return: (in_features,), float64; None if the layer saw no tokens"""
        return self._sums.pop(layer, None)

    def num_tokens(self, layer: nn.Module) -> int:
        """:return: how many tokens of the layer were counted, be its sums taken or not"""
        return self._num_tokens.get(layer, 0)
