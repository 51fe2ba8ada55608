"""
What a block costs to run: operations, and what autograd saves, counted on the meta device.

The whole model runs on tensors without content, at full width. Scaled dot product attention is
counted as the fused kernels do it, which save queries, keys, values, the output and one float32
number for each query. Experts run once for all tokens that go to any of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from autoround_modifier.blocks.patching import forwards_replaced
from autoround_modifier.blocks.samples import as_samples, output_hidden
from autoround_modifier.host.attention import sdpa_computes_the_same, tuning_attention
from autoround_modifier.host.experts import LinearExperts2D
from autoround_modifier.tuning.loss import LOSSES

__all__ = ["BlockCost", "Polynomial", "count_passes"]


@dataclass(frozen=True)
class Polynomial:
    """
    A number that depends on the length of a sample.

    :ivar linear: for each token
    :ivar square: for each pair of tokens
    """

    linear: float
    square: float = 0.0

    def of(self, length: int) -> float:
        """:return: for one sample of ``length`` tokens"""
        return self.linear * length + self.square * length**2


@dataclass(frozen=True)
class BlockCost:
    """
    Of one sample.

    :ivar saved: bytes that autograd saves in the block and the loss, with input and target and
        without weights
    :ivar products: multiplications and additions of all matrix products but those of attention,
        forward
    :ivar attention: those of attention, forward
    :ivar heads: of the widest attention
    """

    saved: Polynomial
    products: Polynomial
    attention: Polynomial
    heads: int


@dataclass(frozen=True)
class _Count:
    saved: float
    products: float
    attention: float
    heads: int


# Tokens of the samples on which costs are counted. Costs are polynomials in the length.
LENGTHS = 256, 128


def count_passes(
    model: PreTrainedModel,
    alike: Mapping[nn.Module, nn.Module],
    trained: set[nn.Module],
    loss: str,
) -> dict[nn.Module, BlockCost]:
    """
    :param model: `host.empty_model`
    :param alike: block -> the first block that is like it, which is counted
    :param trained: layers whose weights are tuned
    :param loss: name in `tuning.loss.LOSSES`
    :return: of the first blocks; those that a text does not reach are not in it
    :raises Exception: if the model does not run without content, such as one that chooses by values
    """
    long, short = LENGTHS
    counts = [_run(model, alike, trained, loss, length) for length in LENGTHS]
    return {
        block: BlockCost(
            _fitted(long, counts[0][block].saved, short, counts[1][block].saved),
            _fitted(long, counts[0][block].products, short, counts[1][block].products),
            _fitted(long, counts[0][block].attention, short, counts[1][block].attention),
            counts[0][block].heads,
        )
        for block in counts[0]
    }


def _fitted(long: int, of_long: float, short: int, of_short: float) -> Polynomial:
    square = (of_long / long - of_short / short) / (long - short)
    if square <= 0:
        return Polynomial(of_long / long)
    return Polynomial(of_long / long - square * long, square)


def _run(
    model: PreTrainedModel,
    alike: Mapping[nn.Module, nn.Module],
    trained: set[nn.Module],
    loss: str,
    length: int,
) -> dict[nn.Module, _Count]:
    counts: dict[nn.Module, _Count] = {}
    outputs: dict[nn.Module, Any] = {}
    sdpa = sdpa_computes_the_same(model)
    storages = {_storage(parameter) for parameter in model.parameters()}

    def counted(block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if alike[block] in outputs:
                return outputs[alike[block]]
            saved: dict[int, Tensor] = {}

            def keep(tensor: Tensor) -> Tensor:
                if _storage(tensor) not in storages:
                    saved[_storage(tensor)] = tensor
                return tensor

            attention = _FusedAttention()
            flops = FlopCounterMode(display=False)
            with (
                torch.enable_grad(),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                flops,
                attention,
            ):
                output = original(*args, **kwargs)
                hidden = as_samples(output_hidden(output))
                target = torch.empty_like(hidden, requires_grad=False)
                LOSSES[loss](hidden, target, None)
            size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
            counts[block] = _Count(
                size + 2 * hidden.nbytes, flops.get_total_flops(), attention.flops, attention.heads
            )
            outputs[block] = _detached(output)
            return outputs[block]

        return forward

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_trainable(model, trained))
        stack.enter_context(tuning_attention(model, sdpa))
        stack.enter_context(_experts_without_routing(model))
        stack.enter_context(forwards_replaced({block: counted(block) for block in alike}))
        ids = torch.empty((1, length), dtype=torch.long, device="meta")
        # As calibration records it: made for eager attention, one number for each pair of tokens
        mask = torch.empty((1, 1, length, length), dtype=model.dtype, device="meta")
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        except Exception:  # it takes masks of another kind
            counts.clear()
            outputs.clear()
            model(input_ids=ids, use_cache=False)
    return counts


def _storage(tensor: Tensor) -> int:
    """:return: identity of the memory of a tensor, whose address on the meta device is 0"""
    return tensor.untyped_storage()._cdata


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return type(output)(map(_detached, output)) if isinstance(output, (tuple, list)) else output


@contextmanager
def _trainable(model: nn.Module, trained: set[nn.Module]) -> Iterator[None]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights = {layer.weight for layer in trained}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in weights)
        yield
    finally:
        for parameter, state in before.items():
            parameter.requires_grad_(state)


@contextmanager
def _experts_without_routing(model: nn.Module) -> Iterator[None]:
    """Let the first expert of each mixture compute for all tokens that go to any of them."""
    experts = [module for module in model.modules() if isinstance(module, LinearExperts2D)]
    with forwards_replaced({module: _expert_forward(module) for module in experts}):
        yield


def _expert_forward(experts: LinearExperts2D) -> Callable[..., Tensor]:
    if len(inspect.signature(type(experts).forward).parameters) == 2:  # Llama 4: sorted before
        return lambda hidden: experts[0](hidden)

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        count = hidden.shape[0] * top_k_index.shape[-1]
        token = torch.empty(count, dtype=torch.long, device=hidden.device)
        weights = top_k_weights[token, token, None]
        output = experts[0](hidden[token]) * weights
        return result.index_add_(0, token, output.to(result.dtype))

    return forward


class _FusedAttention(TorchFunctionMode):
    """
    Replaces scaled dot product attention by a function that saves what fused kernels save.

    :ivar flops: of the calls so far
    :ivar heads: largest number
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.heads = 0.0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3] if len(args) > 2 else (kwargs[x] for x in _OPERANDS)
        width = query.shape[-1] + value.shape[-1]
        self.flops += 2 * query.shape[:-1].numel() * key.shape[-2] * width
        self.heads = max(self.heads, query.shape[-3])
        return _Attention.apply(query, key, value)


_OPERANDS = ("query", "key", "value")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        normalizer = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, normalizer)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("tensors without content have no gradients")
