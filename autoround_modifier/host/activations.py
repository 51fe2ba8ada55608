"""How compressed-tensors quantizes activations, and how LLM-Compressor observes them."""

from __future__ import annotations

from collections.abc import Callable

from compressed_tensors.modeling import KV_CACHE_ATTR, register_key_hook, register_value_hook
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    calculate_range,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from llmcompressor.observers import Observer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "HOOK_REGISTRARS",
    "HOOK_TYPES",
    "Observer",
    "calculate_qparams",
    "calculate_range",
    "compute_dynamic_scales_and_zp",
    "fake_quantize",
    "generate_gparam",
    "has_quantized_cache",
    "new_observer",
    "observer_names",
    "observer_reductions",
    "observer_scales",
]

# By what is quantized: the input of a linear layer; the keys and values that attention caches.
HOOK_TYPES = {"input": "forward_pre", "k": "key", "v": "value"}
HOOK_REGISTRARS: dict[str, Callable[..., RemovableHandle]] = {
    "input": lambda module, hook: module.register_forward_pre_hook(hook),
    "k": register_key_hook,
    "v": register_value_hook,
}


def has_quantized_cache(module: nn.Module) -> bool:
    """:return: whether this is an attention layer whose key-value cache is quantized"""
    return hasattr(module, KV_CACHE_ATTR)


def observer_names() -> list[str]:
    """:return: names of all observers of LLM-Compressor"""
    # The registry takes, and lists, dashes for underscores.
    return [name.replace("-", "_") for name in Observer.registered_names()]


def new_observer(name: str, base_name: str, args: QuantizationArgs) -> Observer:
    """:param base_name: ``input``, ``k`` or ``v``"""
    return Observer.load_from_registry(name, base_name=base_name, args=args)


def observer_reductions(observer: Observer) -> dict[str, object]:
    """:return: statistic -> `torch.distributed.ReduceOp` by which processes combine it"""
    return dict(observer._act_sync_dict)


def observer_scales(observer: Observer) -> dict[str, Tensor | None]:
    """:return: ``scale``, ``zero_point``, ``global_scale`` of what was observed"""
    return observer.get_qparams()  # type: ignore[call-arg]
