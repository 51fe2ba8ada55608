"""What each block saw in the full-precision pass: inputs, outputs, arguments and token masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoround_modifier.calibration.samples import (
    BlockCall,
    content_key,
    output_hidden,
    split_call,
    token_mask,
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
            setattr(self, name, [values[index] for index in order])


class BlockCapture:
    """
    Forward hooks that record what blocks see, one sample per row of each batch.

    The first captured block fixes which samples are used and in which order: sorted by content,
    the first ``num_samples`` of them. So no result depends on the order of the pipeline.

    :param names: name of each block that is recorded
    :param num_samples: largest number of samples to keep; None for all
    :param offload_device: where captured tensors are kept
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        num_samples: int | None,
        offload_device: torch.device | str = "cpu",
    ):
        self.names = names
        self.num_samples = num_samples
        self.offload_device = offload_device
        self.order: list[int] | None = None
        self._blocks: dict[nn.Module, CapturedBlock] = {}

    @torch.no_grad()
    def record(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        loss_mask: Tensor | None = None,
    ) -> None:
        """
        Record one call of a block.

        :param loss_mask: (batch, tokens), 0 for tokens that shall not count in the loss
        :raises NonFiniteError: if the output holds NaN or infinity
        """
        captured = self._blocks.setdefault(block, CapturedBlock())
        offload = self._offload
        outputs = output_hidden(output)
        for row, (hidden, call) in enumerate(split_call(args, kwargs)):
            out = outputs[row : row + 1]
            mask = token_mask(call.kwargs.get("attention_mask"), hidden.shape[1])
            if loss_mask is not None:
                counts = loss_mask[row : row + 1, : hidden.shape[1]].bool().to(hidden.device)
                mask = counts if mask is None else mask & counts
            real = out if mask is None else out[mask]
            if not torch.isfinite(real).all():
                raise NonFiniteError(
                    f"{self.names[block]}: the full-precision output has NaN or infinity in "
                    f"calibration sample {len(captured.outputs)}. Check the weights of this block "
                    "and the calibration text, or load the model in bfloat16 or float32."
                )
            captured.inputs.append(offload(hidden))
            captured.outputs.append(offload(out))
            captured.calls.append(
                BlockCall(
                    tree_map(offload, call.args), tree_map(offload, call.kwargs), call.hidden_name
                )
            )
            captured.masks.append(None if mask is None else offload(mask))

    def pop(self, block: nn.Module) -> CapturedBlock | None:
        """:return: what was recorded for a block, in canonical order; None if it did not run"""
        captured = self._blocks.pop(block, None)
        if captured is None:
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
        self._mask: Tensor | None = None

    def enter_block(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the token mask of the block whose layers run next, so that padding is left out."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            self._mask = token_mask(kwargs.get("attention_mask"), hidden.shape[1])

    @torch.no_grad()
    def record(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Add one batch of inputs, (..., in_features)."""
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return
        x = args[0].detach()
        if self._mask is not None and x.shape[:-1] == self._mask.shape:
            x = x[self._mask]
        squares = x.flatten(0, -2).float().square().sum(0)
        self._sums[layer] = self._sums[layer] + squares if layer in self._sums else squares

    def pop(self, layer: nn.Module) -> Tensor | None:
        """:return: (in_features,), float32; None if the layer saw no tokens"""
        return self._sums.pop(layer, None)
