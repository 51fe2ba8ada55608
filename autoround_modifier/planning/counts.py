"""What a model is made of, and what a recipe makes of it: numbers that no setting changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.engines.layers import ShapedLayer
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.errors import SchemeError
from autoround_modifier.gguf_schemes import GGUF_TYPES
from autoround_modifier.host.blocks import find_blocks, input_embeddings
from autoround_modifier.host.empty_model import EmptyModel, empty_model
from autoround_modifier.host.layers import stored_weight
from autoround_modifier.host.prediction import predict_tensors
from autoround_modifier.host.saved_format import saved_group
from autoround_modifier.host.schemes import (
    QuantizationConfig,
    QuantizationScheme,
)
from autoround_modifier.modifiers.gguf_layers import check_alone, choose_gguf_types
from autoround_modifier.modifiers.routers import (
    ignored_layers,
    unlike_linear,
    untargeted_routers,
)
from autoround_modifier.modifiers.validation import (
    Schemes,
    check_fit,
    check_kv_cache,
    resolve_schemes,
)
from autoround_modifier.planning.block_counts import (
    BlockCounts,
    count_blocks,
    count_groups,
    owner_of,
    width_of,
)
from autoround_modifier.planning.quantities import Quantity
from autoround_modifier.planning.saved_parts import SavedPart, saved_parts
from autoround_modifier.planning.settings import RecipeParts
from autoround_modifier.schemes import resolve_options

__all__ = ["ModelCounts", "count_model"]

# A target or an ignored name that tells one expert from another
_ONE_EXPERT = re.compile(r"experts\W+\d")


@dataclass(frozen=True)
class ModelCounts:
    """
    :ivar architecture: class of the model
    :ivar dtype: of the loaded weights
    :ivar parameters: number of them, tied ones once
    :ivar size: bytes of them, as loaded
    :ivar hidden: width
    :ivar vocabulary: number of tokens, 0 if not known
    :ivar embeddings: bytes of the token embeddings
    :ivar outside: weights of the largest quantized layer outside of blocks
    :ivar blocks: each kind once
    :ivar parts: of the checkpoint
    :ivar quantized: weights that are quantized
    :ivar quantized_groups: of these, that share a scale
    :ivar chosen: weights that an `AutoSchemeModifier` chooses for; 0 if nothing is left to choose
    :ivar chosen_size: (smallest, largest) bytes of them in the checkpoint
    :ivar exports: bytes of other formats, and of what they take while they are written
    :ivar notes: what is not counted, and why
    :ivar layers: that are quantized, as engines see them; where a choice is open, with each option
    :ivar unquantized_layers: names of linear layers that are not
    :ivar single_group: whether the checkpoint has one config group, that targets ``Linear``
    :ivar gguf_blocks: bytes of the blocks of layers that are tuned in types of GGUF
    """

    architecture: str
    dtype: torch.dtype
    parameters: int
    size: int
    hidden: int
    vocabulary: int
    embeddings: int
    outside: int
    blocks: tuple[BlockCounts, ...]
    parts: tuple[SavedPart, ...]
    quantized: int
    quantized_groups: int
    chosen: int = 0
    chosen_size: tuple[int, int] = (0, 0)
    exports: tuple[Quantity, ...] = ()
    notes: tuple[str, ...] = ()
    layers: tuple[ShapedLayer, ...] = ()
    unquantized_layers: tuple[str, ...] = ()
    single_group: bool = False
    gguf_blocks: int = 0

    @property
    def saved(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return sum(part.saved for part in self.parts)

    @property
    def num_blocks(self) -> int:
        return sum(block.number for block in self.blocks)


def count_model(
    config: PreTrainedConfig,
    recipe: RecipeParts,
    loss: str,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> ModelCounts:
    """
    :param config: of the original
    :param recipe: what its layers become
    :param loss: of tuning
    :param dtype: of the loaded weights
    :param trust_remote_code: let a model run its own code
    :raises RecipeError: if Transformers cannot build the model, or no layer is targeted
    :raises SchemeError: if a scheme does not fit its layers
    """
    configs = _own_configs(recipe)
    names = [name for x in configs for group in x.config_groups.values() for name in group.targets]
    names += [name for x in configs for name in x.ignore or ()]
    built = empty_model(config, dtype, trust_remote_code, any(map(_ONE_EXPERT.search, names)))
    model, notes = built.model, list[str]()
    types = _gguf_types(model, recipe)
    if types:
        configs = _own_configs(recipe)
    schemes: Schemes = {}
    for own in configs:
        own.ignore = [*(own.ignore or ()), *untargeted_routers(model, own)]
        own.ignore = [*own.ignore, *unlike_linear(model, own)]
        resolved = resolve_schemes(model, own)
        check_fit({name: x for name, x in resolved.items() if x[1].weights is not None})
        check_kv_cache(model, own.kv_cache_scheme)
        schemes |= resolved
    schemes = {name: found for name, found in schemes.items() if found[1].weights is not None}
    # With types of GGUF, dequantized weights, and blocks beside them
    beside = _blocks(schemes, types)
    tensors = predict_tensors(model, [] if types else configs) | beside
    chosen = _chosen(built, recipe, configs, schemes)
    blocks = count_blocks(built, schemes, loss, notes)
    in_blocks = {x for block in find_blocks(model, None) for x in block.modules()}
    outside = [x.weight.numel() for x, _ in schemes.values() if x not in in_blocks]
    embedding = getattr(input_embeddings(model), "weight", None)
    text = config.get_text_config()
    original = {
        id(x): (name, x) for name, x in reversed(list(model.state_dict(keep_vars=True).items()))
    }
    return ModelCounts(
        architecture=type(model).__name__,
        dtype=dtype,
        parameters=sum(p.numel() * built.copies(name) for name, p in model.named_parameters()),
        size=sum(x.nbytes * built.copies(name) for name, x in original.values()),
        hidden=width_of(built),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        embeddings=0 if embedding is None else embedding.nbytes,
        outside=max(outside, default=0),
        blocks=tuple(blocks),
        parts=tuple(saved_parts(built, schemes, tensors, types)),
        quantized=sum(x.weight.numel() * built.copies(n) for n, (x, _) in schemes.items()),
        quantized_groups=sum(
            count_groups(*found) * built.copies(n) for n, found in schemes.items()
        ),
        chosen=chosen[0],
        chosen_size=chosen[1],
        notes=tuple(notes),
        layers=tuple(_shaped_layers(built, recipe, schemes)),
        unquantized_layers=tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in schemes
        ),
        single_group=recipe.chooser is None and _one_group(configs),
        gguf_blocks=sum(x.nbytes * built.copies(name) for name, x in beside.items()),
    )


def _shaped_layers(
    built: EmptyModel, recipe: RecipeParts, schemes: Schemes
) -> Iterator[ShapedLayer]:
    options = None if recipe.chooser is None else resolve_options(recipe.chooser.options).values()
    for name, (module, own) in schemes.items():
        rows, columns = stored_weight(module).shape[-2:]
        for scheme in (own,) if options is None else options:
            if scheme.weights is None:
                continue
            of_engines = Scheme.of_group(saved_group(scheme))
            assert of_engines is not None
            experts = EXPERT.search(name) is not None
            yield ShapedLayer(name, of_engines, rows, columns, experts, built.copies(name))


def _one_group(configs: list[QuantizationConfig]) -> bool:
    groups = [group for config in configs for group in config.config_groups.values()]
    return len(groups) == 1 and "Linear" in groups[0].targets


def _own_configs(recipe: RecipeParts) -> list[QuantizationConfig]:
    """:return: how each modifier quantizes; where bits are to be chosen, by the widest option"""
    if recipe.chooser is None:
        return [tuner.resolved_config.model_copy(deep=True) for tuner in recipe.tuners]
    configs = []
    for tuner in recipe.tuners:
        if tuner.has_schemes:
            configs.append(tuner.resolved_config.model_copy(deep=True))
        else:
            configs.append(_option_config(recipe, _widest(recipe)))
    return configs


def _gguf_types(model: nn.Module, recipe: RecipeParts) -> dict[str, str]:
    """
    Let modifiers with a scheme of GGUF know the types of the layers.

    :return: layer -> name of its type; nothing without such a modifier
    :raises RecipeError: if another modifier quantizes as well
    :raises SchemeError: if a layer cannot have such a type
    """
    types: dict[str, str] = {}
    for tuner in recipe.tuners:
        if tuner.gguf_scheme is None:
            continue
        others = (*recipe.tuners, *filter(None, (recipe.chooser, recipe.distiller)))
        check_alone(tuner, others)
        tuner.set_gguf_types({})  # of another model
        own = tuner.resolved_config.model_copy(deep=True)
        own.ignore = [*(own.ignore or ()), *ignored_layers(model, own)]
        schemes = resolve_schemes(model, own)
        types = choose_gguf_types(model, tuner.gguf_scheme, schemes, find_blocks(model, None))
        tuner.set_gguf_types(types)
    return types


def _blocks(schemes: Schemes, types: Mapping[str, str]) -> dict[str, Tensor]:
    """:return: of each layer the blocks that are saved beside the model, on the meta device"""
    found = {}
    for name, type_name in types.items():
        kind, (rows, columns) = GGUF_TYPES[type_name], schemes[name][0].weight.shape
        size = (rows, columns // kind.block * kind.block_bytes)
        found[f"{name}.blocks"] = torch.empty(size, dtype=torch.uint8, device="meta")
    return found


def _option_config(recipe: RecipeParts, scheme: QuantizationScheme) -> QuantizationConfig:
    chooser = recipe.chooser
    assert chooser is not None
    targets = [chooser.targets] if isinstance(chooser.targets, str) else chooser.targets
    ignore = [*chooser.ignore, *(name for x in recipe.tuners for name in x.ignore)]
    group = scheme.model_copy(update={"targets": list(targets)}, deep=True)
    return QuantizationConfig(config_groups={"group_0": group}, ignore=ignore)


def _widest(recipe: RecipeParts) -> QuantizationScheme:
    assert recipe.chooser is not None
    options = resolve_options(recipe.chooser.options).values()
    return max(options, key=lambda x: x.weights.num_bits if x.weights is not None else 0)


def _chosen(
    built: EmptyModel, recipe: RecipeParts, configs: list[QuantizationConfig], schemes: Schemes
) -> tuple[int, tuple[int, int]]:
    """
    :return: weights that are chosen for, and the bytes of the smallest and the largest choice
    :raises SchemeError: if the smallest does not fit the budget
    """
    if recipe.chooser is None:
        return 0, (0, 0)
    weights = sum(x.weight.numel() * built.copies(name) for name, (x, _) in schemes.items())
    sizes = []
    for scheme in resolve_options(recipe.chooser.options).values():
        own = [
            _option_config(recipe, scheme).model_copy(update={"ignore": x.ignore}) for x in configs
        ]
        tensors = predict_tensors(built.model, own if scheme.weights is not None else [])
        owned = (
            x.nbytes * built.copies(name)
            for name, x in tensors.items()
            if owner_of(name) in schemes and not name.endswith(".bias")
        )
        sizes.append(sum(owned))
    if not recipe.chooser.whole_model and 8 * min(sizes) > recipe.chooser.avg_bits * weights:
        raise SchemeError(
            f"avg_bits is {recipe.chooser.avg_bits}, but the smallest option takes "
            f"{8 * min(sizes) / weights:.3f} bits for each weight, scales included; raise avg_bits "
            "or add a smaller option"
        )
    return weights, (min(sizes), max(sizes))
