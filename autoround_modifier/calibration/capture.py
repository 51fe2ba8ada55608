"""What each block saw in the full-precision pass: inputs, outputs, arguments and token masks."""

from __future__ import annotations

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
from autoround_modifier.errors import NonFiniteError

__all__ = ["BlockCapture", "CapturedBlock", "ImportanceCapture"]


@dataclass
class CapturedBlock:
    """
    All samples of one block, in the pipeline's order.

    :ivar inputs: full-precision hidden states, (1, tokens, hidden) each
    :ivar outputs: full-precision outputs, same shapes: the targets of tuning
    :ivar calls: the other arguments of each call
    :ivar masks: (1, tokens) bool each, False for tokens that do not count; None if all count
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    def select(self, order: list[int]) -> None:
        """Keep the samples ``order``, in that order."""
        for name in ("inputs", "outputs", "calls", "masks"):
            values = getattr(self, name)
            if values:
                setattr(self, name, [values[index] for index in order])


class BlockCapture:
    """
    Forward hooks that record what blocks see, one sample per row of each batch.

    The first block that is taken out fixes which samples are used and in which order: sorted by
    content, the first ``num_samples`` of them. So no result depends on the pipeline's order.

    :param names: name of each block that is recorded
    :param num_samples: largest number of samples to keep; None for all
    :param offload_device: where captured tensors are kept
    :param keep_outputs: false where nobody needs them
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        num_samples: int | None,
        offload_device: torch.device | str = "cpu",
        keep_outputs: bool = True,
    ):
        self.names = names
        self.num_samples = num_samples
        self.keep_outputs = keep_outputs
        self.offload_device = offload_device
        self.order: list[int] | None = None
        self.num_recorded = 0
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

    def pop(self, block: nn.Module) -> CapturedBlock | None:
        """
        :return: what was recorded for a block, in canonical order; None if it did not run, or not
            once for each sample, like the blocks of a vision tower beside those of a language model
        """
        captured = self._blocks.pop(block, None)
        if captured is None:
            return None
        self.num_recorded = self.num_recorded or len(captured.inputs)
        if len(captured.inputs) != self.num_recorded:
            return None
        if self.order is None:
            keys = [
                content_key(hidden, mask)
                for hidden, mask in zip(captured.inputs, captured.masks, strict=True)
            ]
            order = sorted(range(len(keys)), key=keys.__getitem__)
            self.order = order[: self.num_samples]
        captured.select(self.order)
        return captured

    def _offload(self, value: Any) -> Any:
        return value.detach().to(self.offload_device) if isinstance(value, Tensor) else value


class ImportanceCapture:
    """
    Sums ``x_j^2`` per input channel of each layer over all calibration tokens: the importance
    h_j of SignRoundV2 (https://arxiv.org/abs/2512.04746).
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}

    @torch.no_grad()
    def record(
        self, layer: nn.Module, args: tuple[Any, ...], token_mask: Tensor | None = None
    ) -> None:
        """
        Add one batch of inputs, (..., in_features).

        :param token_mask: (batch, tokens), bool, False for tokens that shall not count; without
            effect on layers that see tokens in another arrangement, such as routed experts
        """
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return
        x = args[0].detach()
        if token_mask is not None and x.shape[:-1] == token_mask.shape:
            x = x[token_mask]
        # float64, so that the order of the batches does not show in the result
        squares = x.flatten(0, -2).float().square().sum(0).double()
        self._sums[layer] = self._sums[layer] + squares if layer in self._sums else squares

    def copy(self) -> ImportanceCapture:
        """:return: the same record; what is taken out of it stays in this one"""
        other = ImportanceCapture()
        other._sums = dict(self._sums)
        return other

    def pop(self, layer: nn.Module) -> Tensor | None:
        """:return: (in_features,), float32; None if the layer saw no tokens"""
        total = self._sums.pop(layer, None)
        return None if total is None else total.float()
