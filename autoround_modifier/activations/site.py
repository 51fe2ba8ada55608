"""
A place where activations are quantized while the model runs.

How they are quantized is compressed-tensors' own: the same function that quantizes them in a loaded
checkpoint, with the scales of the module. Added are a gradient, which passes straight through
(SignRound, https://arxiv.org/abs/2309.05516, section 3.1, for weights), and statistics of what
was seen, by LLM-Compressor's observers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
import torch.distributed as dist
from compressed_tensors.modeling import KV_CACHE_ATTR, register_key_hook, register_value_hook
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.observers import Observer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoround_modifier.activations.functional import fake_quantize_activation
from autoround_modifier.activations.support import needs_calibration
from autoround_modifier.distributed import gathered, is_distributed
from autoround_modifier.errors import CalibrationError
from autoround_modifier.formats.fusion import fuse

__all__ = ["DEFAULT_OBSERVER", "ActivationSite", "activation_sites"]

DEFAULT_OBSERVER = "static_minmax"
QPARAMS = ("scale", "zero_point", "global_scale")
HOOK_TYPES = {"input": "forward_pre", "k": "key", "v": "value"}
REGISTER: dict[str, Callable[..., RemovableHandle]] = {
    "input": lambda module, hook: module.register_forward_pre_hook(hook),
    "k": register_key_hook,
    "v": register_value_hook,
}


class ActivationSite:
    """
    :param name: of the module, for messages
    :param module: linear layer or attention layer that keeps the scale
    :param base_name: ``input`` of a linear layer, (..., in_features); ``k`` or ``v``, what an
        attention layer caches, (batch, heads, tokens, head_dim)
    :param args: how it is quantized
    :param fused: compute with `torch.compile`; the values are the same, sooner
    :ivar calibrated: whether no scale is lacking
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        base_name: str,
        args: QuantizationArgs,
        fused: bool = False,
    ):
        self.name = name
        self.module = module
        self.base_name = base_name
        self.args = args
        self.fused = fused
        self.calibrated = not needs_calibration(args)
        self.hook_type = HOOK_TYPES[base_name]
        self._observer: Observer | None = None
        self._earlier: Observer | None = None

    def hook(self, function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        """
        :param function: sees each activation, and may return another in its place
        :return: the same as a hook of `hook_type` on the module
        """
        if self.base_name != "input":
            return lambda module, states: function(states)

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            replaced = function(args[0])
            return None if replaced is None else (replaced, *args[1:])

        return before_forward

    def register(self, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Let ``function`` see, or replace, each activation until the handle is removed."""
        return REGISTER[self.base_name](self.module, self.hook(function))

    # ------------------------------------------------------------------ calibration

    @torch.no_grad()
    def observe(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """
        Count ``x`` in, where a scale needs calibration.

        :param token_mask: (batch, tokens), bool, False for padding; without effect on layers that
            see tokens in another arrangement, such as routed experts
        """
        if not needs_calibration(self.args):
            return
        if self._observer is None:
            self._observer = self._new_observer()
        if self.base_name == "input":
            if token_mask is not None and x.shape[:-1] == token_mask.shape:
                x = x[token_mask]
            x = x.reshape(1, -1, x.shape[-1])
        elif token_mask is not None:
            by_token = x.transpose(1, 2)  # (batch, tokens, heads, head_dim)
            x = by_token[token_mask].unsqueeze(0).transpose(1, 2)
        self._observer(x)

    @property
    def observed(self) -> bool:
        """Whether anything was seen that a scale can be found from."""
        return self._statistics() is not None

    def observe_anew(self) -> None:
        """Set aside what was observed; it counts only if nothing is observed from now on."""
        self._earlier, self._observer = self._observer, None

    def _new_observer(self) -> Observer:
        return Observer.load_from_registry(
            self.args.observer or DEFAULT_OBSERVER, base_name=self.base_name, args=self.args
        )

    def synchronize(self) -> None:
        """
        Count in what other processes observed; without effect if there are none.

        :raises CalibrationError: if the observer keeps anything but minima and maxima
        """
        if not is_distributed():
            return
        # What was seen earlier counts only where no process has seen anything since.
        fresh = self._observer if self._observer and self._observer.has_statistics else None
        anyone = any(gathered(fresh is not None))
        observer = (fresh if anyone else self._statistics()) or self._new_observer()
        reduce: dict[Any, Any] = {dist.ReduceOp.MIN: torch.amin, dist.ReduceOp.MAX: torch.amax}
        kinds = observer._act_sync_dict
        if not kinds or any(kind not in reduce for kind in kinds.values()):
            raise CalibrationError(
                f"{self.name}: several processes cannot share what observer `{self.args.observer}` "
                f"saw; use `observer: {DEFAULT_OBSERVER}`"
            )
        mine = {name: getattr(observer, name).cpu() for name in kinds if observer.has_statistics}
        shares = [share for share in gathered(mine) if share]
        for name, kind in kinds.items():
            if shares:
                seen = torch.stack([share[name] for share in shares])
                device = next(self.module.parameters()).device
                setattr(observer, name, reduce[kind](seen, 0).to(device))
        if shares:
            self._observer = observer

    def calibrate(self) -> None:
        """
        Write the scales of what was observed into the module, and forget it.

        :raises CalibrationError: if nothing was observed
        """
        observer = self._statistics()
        if observer is None:
            raise CalibrationError(
                f"{self.name}: its activations have a static scale, and no calibration sample "
                "reached it. Calibrate on data that does, or add it to `ignore`."
            )
        qparams: dict[str, Tensor | None] = observer.get_qparams()  # type: ignore[call-arg]
        for name, value in qparams.items():
            parameter = f"{self.base_name}_{name}"
            if value is not None and hasattr(self.module, parameter):
                update_offload_parameter(self.module, parameter, value)
        self.calibrated = True
        self._observer = self._earlier = None

    def _statistics(self) -> Observer | None:
        seen = (x for x in (self._observer, self._earlier) if x is not None and x.has_statistics)
        return next(seen, None)

    def calibrate_or_keep_one(self) -> bool:
        """
        `calibrate`, but a cache that no sample reached gets the scale 1, as engines take it where
        a checkpoint has none.

        :return: whether that happened
        :raises CalibrationError: if nothing was observed of the input of a linear layer
        """
        if self.base_name == "input" or self.observed:
            self.calibrate()
            return False
        scale = getattr(self.module, f"{self.base_name}_scale")
        update_offload_parameter(self.module, f"{self.base_name}_scale", torch.ones_like(scale))
        self.calibrated = True
        return True

    def scales(self) -> dict[str, Tensor]:
        """:return: the static scales that were found: ``scale`` and what goes with it"""
        if not self.calibrated or not needs_calibration(self.args):
            return {}
        found = {name: getattr(self.module, f"{self.base_name}_{name}", None) for name in QPARAMS}
        return {name: value for name, value in found.items() if value is not None}

    def set_scales(self, scales: dict[str, Tensor]) -> None:
        """
        :param scales: what `scales` returned; nothing changes where that was nothing
        """
        for name, value in scales.items():
            update_offload_parameter(self.module, f"{self.base_name}_{name}", value)
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
        function = _fused_fake_quantize if self.fused else fake_quantize_activation
        with torch.no_grad():
            quantized, represented = function(batched, scale, zero_point, global_scale, self.args)
        return _StraightThrough.apply(batched, quantized, represented).view_as(x)


_fused_fake_quantize = fuse(fake_quantize_activation)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, represented: Tensor | None) -> Tensor:
        ctx.save_for_backward(represented)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (represented,) = gradients, ctx.saved_tensors
        return gradient if represented is None else gradient * represented, None, None


def activation_sites(
    named_modules: Iterable[tuple[str, nn.Module]],
    layers: Container[nn.Module],
    kv_cache: bool,
    fused: bool,
) -> list[ActivationSite]:
    """
    :param named_modules: of a model whose schemes are applied
    :param layers: the linear layers that count
    :param kv_cache: whether what attention layers cache counts
    :param fused: see `ActivationSite`
    :return: one site for each input, key and value that is quantized
    """
    sites = []
    for name, module in named_modules:
        args = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if args is None:
            continue
        if kv_cache and hasattr(module, KV_CACHE_ATTR):
            base_names: tuple[str, ...] = ("k", "v")
        else:
            base_names = ("input",) if module in layers else ()
        sites += [ActivationSite(name, module, base, args, fused) for base in base_names]
    return sites
