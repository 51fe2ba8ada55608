"""What tuning needs of a model whose schemes are applied: layers, activations, experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from autoround_modifier.activations import ActivationQuantizer, activation_quantizers
from autoround_modifier.blocks.experts import ExpertRouting
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.device import Compute
from autoround_modifier.formats.gguf_specs import GGUF_SPECS
from autoround_modifier.host.saved_format import choose_saved_format
from autoround_modifier.host.schemes import weight_spec
from autoround_modifier.modifiers.gguf_blocks import TunedBlocks
from autoround_modifier.modifiers.layer_quantizer import LayerQuantizer
from autoround_modifier.modifiers.validation import Schemes
from autoround_modifier.search.initial_weights import InitialWeights

__all__ = ["PreparedModel", "prepare_model"]


@dataclass
class PreparedModel:
    """
    :param quantizer: of all targeted layers
    :param activations: that are quantized
    :param routing: which tokens each expert receives
    """

    quantizer: LayerQuantizer = field(
        default_factory=lambda: LayerQuantizer(InitialWeights({}, {}, Importance()), {})
    )
    activations: list[ActivationQuantizer] = field(default_factory=list)
    routing: ExpertRouting = field(default_factory=lambda: ExpertRouting(nn.Module()))


def prepare_model(
    model: nn.Module,
    schemes: Schemes,
    compute: Compute,
    kv_cache: bool,
    min_expert_tokens: int,
    blocks: TunedBlocks | None = None,
) -> PreparedModel:
    """
    :param model: with its schemes applied; the format in which layers are saved is set
    :param schemes: of the targeted layers
    :param compute: runs search, tuning and the quantization of activations
    :param kv_cache: whether the key-value cache is quantized
    :param min_expert_tokens: see `InitialWeights`
    :param blocks: takes the layers that are tuned in a type of GGUF, whose scheme of
        compressed-tensors is only a carrier
    """
    types = {} if blocks is None else blocks.types
    names = {layer: name for name, (layer, _) in schemes.items()}
    for layer in names:
        choose_saved_format(layer.quantization_scheme, type(layer))
    args = {layer: scheme.weights for layer, scheme in schemes.values()}
    specs = {
        layer: GGUF_SPECS[types[name]] if name in types else weight_spec(args[layer])
        for layer, name in names.items()
    }
    routing = ExpertRouting(model)
    initial = InitialWeights(names, specs, Importance(), compute, routing.layers, min_expert_tokens)
    activations = activation_quantizers(model.named_modules(), names, kv_cache, compute)
    return PreparedModel(LayerQuantizer(initial, args, blocks), activations, routing)
