"""
Quantizes one activation while the model runs: the input of a linear layer, keys, or values.

The arithmetic is that of compressed-tensors: the function that quantizes activations in a loaded
checkpoint, with the scales of the module. Added is a gradient, which passes straight through
(SignRound, https://arxiv.org/abs/2309.05516, section 3.1, for weights).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoround_modifier.activations.functional import fake_quantize_activation
from autoround_modifier.activations.statistics import ActivationStatistics
from autoround_modifier.activations.support import needs_calibration
from autoround_modifier.device import Compute
from autoround_modifier.errors import CalibrationError
from autoround_modifier.host.activations import HOOK_REGISTRARS, HOOK_TYPES, has_quantized_cache
from autoround_modifier.host.layers import write_parameter
from autoround_modifier.host.schemes import QuantizationArgs

__all__ = ["QPARAMS", "ActivationQuantizer", "activation_quantizers", "calibrate_remaining"]

QPARAMS = ("scale", "zero_point", "global_scale")


class ActivationQuantizer:
    """
    :param name: of the module, for messages
    :param module: linear layer or attention layer that keeps the scale
    :param base_name: ``input`` of a linear layer, (..., in_features); ``k`` or ``v``, what an
        attention layer caches, (batch, heads, tokens, head_dim)
    :param args: how the activation is quantized
    :param compute: runs the quantization
    :ivar calibrated: whether all scales are known
    :ivar statistics: from which a static scale is computed; None if the scale is dynamic
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        base_name: str,
        args: QuantizationArgs,
        compute: Compute | None = None,
    ):
        self.name = name
        self.module = module
        self.base_name = base_name
        self.args = args
        self.compute = compute or Compute()
        self.calibrated = not needs_calibration(args)
        self.hook_type = HOOK_TYPES[base_name]
        self.statistics = (
            ActivationStatistics(name, base_name, args) if needs_calibration(args) else None
        )

    def hook(self, function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        """
        :param function: receives each activation, and may return another in its place
        :return: the same as a hook of `hook_type` on the module
        """
        if self.base_name != "input":
            return lambda module, states: function(states)

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            replaced = function(args[0])
            return None if replaced is None else (replaced, *args[1:])

        return before_forward

    def register(self, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call ``function`` with each activation until the handle is removed; see `hook`."""
        return HOOK_REGISTRARS[self.base_name](self.module, self.hook(function))

    # ------------------------------------------------------------------ calibration

    def record(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Record ``x`` if the scale is static; parameters of `ActivationStatistics.record`."""
        if self.statistics is not None:
            self.statistics.record(x, token_mask)

    def synchronize(self) -> None:
        """Add what other processes recorded, see `ActivationStatistics.synchronize`."""
        if self.statistics is not None:
            self.statistics.synchronize(next(self.module.parameters()).device)

    def calibrate(self) -> None:
        """
        Write the scales of what was recorded into the module, and forget what was recorded.

        :raises CalibrationError: if nothing was recorded
        """
        scales = None if self.statistics is None else self.statistics.scales()
        if scales is None:
            raise CalibrationError(
                f"{self.name}: its activations have a static scale, and no calibration sample "
                "reached it. Calibrate on data that does, or add it to `ignore`."
            )
        for name, value in scales.items():
            parameter = f"{self.base_name}_{name}"
            if value is not None and hasattr(self.module, parameter):
                write_parameter(self.module, parameter, value)
        self.calibrated = True
        self.statistics = ActivationStatistics(self.name, self.base_name, self.args)

    def calibrate_or_keep_one(self) -> bool:
        """
        `calibrate`, but a cache that no sample reached gets the scale 1, which engines use where a
        checkpoint has none.

        :return: whether that happened
        :raises CalibrationError: if nothing was recorded of the input of a linear layer
        """
        if self.base_name == "input" or (self.statistics is not None and self.statistics.found):
            self.calibrate()
            return False
        scale = getattr(self.module, f"{self.base_name}_scale")
        write_parameter(self.module, f"{self.base_name}_scale", torch.ones_like(scale))
        self.calibrated = True
        return True

    def scales(self) -> dict[str, Tensor]:
        """:return: the static scales that were found: ``scale`` and what belongs to it"""
        if not self.calibrated or not needs_calibration(self.args):
            return {}
        found = {name: getattr(self.module, f"{self.base_name}_{name}", None) for name in QPARAMS}
        return {name: value for name, value in found.items() if value is not None}

    def set_scales(self, scales: dict[str, Tensor]) -> None:
        """:param scales: what `scales` returned; nothing changes where that was nothing"""
        for name, value in scales.items():
            write_parameter(self.module, f"{self.base_name}_{name}", value)
        self.calibrated = self.calibrated or bool(scales)

    # ------------------------------------------------------------------ quantization

    def quantize(self, x: Tensor) -> Tensor:
        """
        ``x`` as it is after quantization and dequantization at inference, same shape and dtype.
        Its gradient passes straight through, and is zero where a static scale cuts off.
        """
        # compressed-tensors would take the tokens of a two-dimensional input for one
        batched = x if x.ndim > 2 else x.unsqueeze(0)
        scale, zero_point, global_scale = (
            getattr(self.module, f"{self.base_name}_{name}", None) for name in QPARAMS
        )
        arguments = (batched, scale, zero_point, global_scale, self.args)
        with torch.no_grad():
            ((quantized, represented),) = self.compute.run(
                fake_quantize_activation, lambda _: [arguments], x.device
            )
        return _StraightThrough.apply(batched, quantized, represented).view_as(x)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, represented: Tensor | None) -> Tensor:
        ctx.save_for_backward(represented)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (represented,) = gradients, ctx.saved_tensors
        return gradient if represented is None else gradient * represented, None, None


def activation_quantizers(
    named_modules: Iterable[tuple[str, nn.Module]],
    layers: Container[nn.Module],
    kv_cache: bool,
    compute: Compute,
) -> list[ActivationQuantizer]:
    """
    :param named_modules: of a model whose schemes are applied
    :param layers: the linear layers that count
    :param kv_cache: whether what attention layers cache counts
    :param compute: see `ActivationQuantizer`
    :return: one for each input, key and value that is quantized
    """
    found = []
    for name, module in named_modules:
        args = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if args is None:
            continue
        if kv_cache and has_quantized_cache(module):
            base_names: tuple[str, ...] = ("k", "v")
        else:
            base_names = ("input",) if module in layers else ()
        found += [ActivationQuantizer(name, module, base, args, compute) for base in base_names]
    return found


def calibrate_remaining(activations: list[ActivationQuantizer]) -> None:
    """Find static scales that tuning has not found, on what the full-precision model gave."""
    for one in activations:
        if one.calibrated:
            continue
        one.synchronize()
        if one.calibrate_or_keep_one():
            logger.warning(
                f"{one.name}: no calibration sample reached its key-value cache, whose scale "
                "stays 1"
            )
