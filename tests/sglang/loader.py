"""
SGLang's own configurations, layers and weight loaders, as on a GPU of a given compute capability.

Nothing is computed: the linear layers of the first block are made as its Llama makes them, and the
tensors of a checkpoint are loaded into them. What a kernel would refuse later is asked of Marlin's
own check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import load_file
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization import marlin_utils
from sglang.srt.layers.quantization.awq import awq
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_loader.weight_utils import get_quant_config
from sglang.srt.models.gemma2 import Gemma2ForCausalLM
from torch import nn

BLOCK = "model.layers.0"
# As `LlamaForCausalLM` of SGLang fuses them: layer -> its layers in the checkpoint, by shard
FUSED: dict[str, dict[object, str]] = {
    "self_attn.qkv_proj": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
    },
    "self_attn.o_proj": {None: "self_attn.o_proj"},
    "mlp.gate_up_proj": {0: "mlp.gate_proj", 1: "mlp.up_proj"},
    "mlp.down_proj": {None: "mlp.down_proj"},
}
TRANSPOSED = ("qweight", "qzeros", "scales")  # of AWQ and GPTQ
# Of a class that names its fused layers, as not all of SGLang's do
FUSED_BY_GEMMA = Gemma2ForCausalLM.packed_modules_mapping


class Refused(Exception):
    """SGLang does not take the checkpoint."""


@dataclass(frozen=True)
class Loaded:
    """
    :ivar method: class of SGLang's that runs the layer
    :ivar scheme: class of its scheme, empty where the method has none
    """

    method: str
    scheme: str


@contextmanager
def gpu(capability: int) -> Iterator[None]:
    """
    SGLang's configuration as on an NVIDIA GPU.

    :param capability: times ten
    """
    pair = divmod(capability, 10)
    methods = {k: v for k, v in quantization.QUANTIZATION_METHODS.items() if k != "gptq"}  # of CPUs
    with ExitStack() as stack:
        for target, name, new in (
            (torch.cuda, "get_device_capability", lambda *args, **kwargs: pair),
            (marlin_utils, "get_device_capability", lambda *args, **kwargs: pair),
            (awq, "_is_cuda", True),
            (quantization, "QUANTIZATION_METHODS", methods),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield


def fused_layers(model_class: type[nn.Module]) -> dict[str, list[str]]:
    """:return: of a class of SGLang's, as its loader asks for it"""
    return getattr(model_class, "packed_modules_mapping", {})


def load(
    folder: Path,
    capability: int,
    option: str | None = None,
    fused: Mapping[str, list[str]] = FUSED_BY_GEMMA,
) -> dict[str, Loaded]:
    """
    :param folder: of a checkpoint of a small Llama
    :param capability: of the GPU, times ten
    :param option: of ``--quantization``
    :param fused: what the class of the model says of its fused layers
    :return: what SGLang loads each linear layer of the first block into
    :raises Refused: if it refuses the checkpoint, would run a layer unquantized, or has no place
        for a tensor
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    with gpu(capability):
        try:
            settings = _configuration(config, capability, option, fused)
            return {
                name: _load_layer(config, settings, name, shards, tensors)
                for name, shards in FUSED.items()
            }
        except Refused:
            raise
        except Exception as error:  # whatever SGLang raises, a user would meet
            raise Refused(f"{type(error).__name__}: {error}") from error


def _configuration(
    config: dict, capability: int, option: str | None, fused: Mapping[str, list[str]]
) -> QuantizationConfig:
    """:return: that of the checkpoint, found as SGLang's `ModelConfig` and loader find it"""
    section = config["quantization_config"]
    method = section["quant_method"]
    for known in quantization.QUANTIZATION_METHODS.values():
        if found := known.override_quantization_method(section, option):
            method = found
            break
    if option not in (None, method):
        raise Refused(f"the checkpoint is of {method}, not of {option}")
    model_config = SimpleNamespace(
        quantization=method,
        hf_config=config,
        is_draft_model=False,
    )
    settings = get_quant_config(model_config, None, dict(fused))
    if capability < settings.get_min_capability():
        raise Refused(f"{method} needs compute capability {settings.get_min_capability()}")
    return settings


def _load_layer(
    config: dict,
    settings: QuantizationConfig,
    name: str,
    shards: Mapping[object, str],
    tensors: Mapping[str, torch.Tensor],
) -> Loaded:
    layer = _make(config, settings, name)
    names = [f"{BLOCK}.{source}" for source in shards.values()]
    plain = all(f"{x}.weight" in tensors and f"{x}.weight_scale" not in tensors for x in names)
    if not plain and isinstance(layer.quant_method, UnquantizedLinearMethod):
        raise Refused(f"{name}: SGLang takes the layer for one that is not quantized")
    parameters = dict(layer.named_parameters())
    loaded: dict[str, list[torch.Tensor]] = {}
    for shard, source in shards.items():
        prefix = f"{BLOCK}.{source}."
        for full, tensor in tensors.items():
            if not full.startswith(prefix):
                continue
            part = full.removeprefix(prefix)
            if part not in parameters:
                raise Refused(f"{name}: no place for `{part}` among {sorted(parameters)}")
            parameter = parameters[part]
            arguments = (tensor,) if shard is None else (tensor, shard)
            parameter.weight_loader(parameter, *arguments)
            loaded.setdefault(part, []).append(tensor)
    _compare(name, parameters, loaded)
    scheme, method = getattr(layer, "scheme", None), layer.quant_method
    if isinstance(scheme, CompressedTensorsWNA16):
        marlin_utils.verify_marlin_supported(
            scheme.quant_type, scheme.group_size, not scheme.symmetric
        )
    return Loaded(type(method).__name__, "" if scheme is None else type(scheme).__name__)


def _make(config: dict, settings: QuantizationConfig, name: str) -> LinearBase:
    """:return: the layer, as SGLang's Llama makes it on one GPU"""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    options = {
        "bias": False,
        "params_dtype": torch.bfloat16,
        "quant_config": settings,
        "prefix": f"{BLOCK}.{name}",
        "parallel_group": "replicated",
    }
    if name == "self_attn.qkv_proj":
        return QKVParallelLinear(hidden, hidden // heads, heads, kv_heads, **options)
    if name == "mlp.gate_up_proj":
        return MergedColumnParallelLinear(hidden, [inner, inner], **options)
    return RowParallelLinear(inner if name == "mlp.down_proj" else hidden, hidden, **options)


def _compare(
    name: str,
    parameters: Mapping[str, torch.Tensor],
    loaded: Mapping[str, list[torch.Tensor]],
) -> None:
    """:raises Refused: if a parameter does not hold the tensors that were loaded into it"""
    for part, parameter in parameters.items():
        found = loaded.get(part)
        if found is None:
            # Humming's methods keep an empty `weight`; the order of features is not that of
            # activations, so that nobody reads `g_idx`
            if parameter.numel() > 1 and part != "g_idx":
                raise Refused(f"{name}: the checkpoint has no `{part}`")
            continue
        if part in ("weight_shape", "g_idx"):  # the same for all layers that are fused
            continue
        whole = torch.cat(found, 1 if part in TRANSPOSED else 0)
        if not torch.equal(parameter.data.flatten(), whole.to(parameter.dtype).flatten()):
            raise Refused(f"{name}: `{part}` is not what was loaded")


def cache_format(folder: Path) -> str | None:
    """:return: in which SGLang keeps the key-value cache of a checkpoint; None for 16 bits"""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return CompressedTensorsConfig.from_config(config).kv_cache_quant_algo
