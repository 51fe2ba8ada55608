"""What a model is made of, and what a recipe makes of it: numbers that no setting changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import nn
from transformers import PreTrainedConfig

from autoround_modifier.errors import SchemeError
from autoround_modifier.host.blocks import find_blocks, input_embeddings
from autoround_modifier.host.empty_model import EmptyModel, empty_model
from autoround_modifier.host.layers import Layer
from autoround_modifier.host.prediction import predict_tensors
from autoround_modifier.host.schemes import (
    QuantizationConfig,
    QuantizationScheme,
    weight_spec,
)
from autoround_modifier.modifiers.routers import unlike_linear, untargeted_routers
from autoround_modifier.modifiers.validation import (
    Schemes,
    check_fit,
    check_kv_cache,
    resolve_schemes,
)
from autoround_modifier.planning.forward_pass import BlockCost, Polynomial, count_passes
from autoround_modifier.planning.settings import RecipeParts
from autoround_modifier.schemes import resolve_options

__all__ = ["BlockCounts", "ModelCounts", "SavedPart", "count_model"]

# A target or an ignored name that tells one expert from another
_ONE_EXPERT = re.compile(r"experts\W+\d")


@dataclass(frozen=True)
class SavedPart:
    """
    Some tensors of the model.

    :ivar parameters: numbers in them, in the original
    :ivar original: bytes in the dtype of the loaded model
    :ivar saved: bytes in the checkpoint
    :ivar bits: of the values, and which share a scale, as ``2, groups of 64``; the commonest
    """

    name: str
    parameters: int
    original: int
    saved: int
    bits: str


@dataclass(frozen=True)
class BlockCounts:
    """
    Blocks that are alike.

    :ivar name: of the first
    :ivar number: how many there are
    :ivar size: bytes of all tensors of one, as loaded
    :ivar dense: weights of linear layers that see every token
    :ivar experts: weights of routed experts
    :ivar active: weights of the experts of one token
    :ivar tuned_dense: quantized weights among ``dense``
    :ivar tuned_experts: among ``experts``
    :ivar groups: of quantized weights, that share a scale
    :ivar expert_layers: number of linear layers of the experts
    :ivar largest: weights of the largest quantized layer
    :ivar largest_expert: of the largest quantized one of an expert
    :ivar quantized_inputs: numbers of one token in inputs that are quantized
    :ivar cost: of one sample
    :ivar counted: false where ``cost`` is assumed, because the block does not run without content
    :ivar runs_on_text: whether text reaches it; those of a vision encoder are given images
    """

    name: str
    number: int
    size: int
    dense: int
    experts: int
    active: int
    tuned_dense: int
    tuned_experts: int
    groups: int
    expert_layers: int
    largest: int
    largest_expert: int
    quantized_inputs: int
    cost: BlockCost
    counted: bool
    runs_on_text: bool

    @property
    def tuned(self) -> int:
        """Quantized weights."""
        return self.tuned_dense + self.tuned_experts


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
    :ivar notes: what is not counted, and why
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
    notes: tuple[str, ...] = ()

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
    schemes: Schemes = {}
    for own in configs:
        own.ignore = [*(own.ignore or ()), *untargeted_routers(model, own)]
        own.ignore = [*own.ignore, *unlike_linear(model, own)]
        resolved = resolve_schemes(model, own)
        check_fit({name: x for name, x in resolved.items() if x[1].weights is not None})
        check_kv_cache(model, own.kv_cache_scheme)
        schemes |= resolved
    schemes = {name: found for name, found in schemes.items() if found[1].weights is not None}
    tensors = predict_tensors(model, configs)
    chosen = _chosen(built, recipe, configs, schemes)
    blocks = _count_blocks(built, schemes, loss, notes)
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
        hidden=_width(built),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        embeddings=0 if embedding is None else embedding.nbytes,
        outside=max(outside, default=0),
        blocks=tuple(blocks),
        parts=tuple(_saved_parts(built, schemes, tensors)),
        quantized=sum(x.weight.numel() * built.copies(n) for n, (x, _) in schemes.items()),
        quantized_groups=sum(_groups(*found) * built.copies(n) for n, found in schemes.items()),
        chosen=chosen[0],
        chosen_size=chosen[1],
        notes=tuple(notes),
    )


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
            if _owner(name) in schemes and not name.endswith(".bias")
        )
        sizes.append(sum(owned))
    if not recipe.chooser.whole_model and 8 * min(sizes) > recipe.chooser.avg_bits * weights:
        raise SchemeError(
            f"avg_bits is {recipe.chooser.avg_bits}, but the smallest option takes "
            f"{8 * min(sizes) / weights:.3f} bits for each weight, scales included; raise avg_bits "
            "or add a smaller option"
        )
    return weights, (min(sizes), max(sizes))


def _width(built: EmptyModel) -> int:
    """:return: size of the hidden states"""
    embedding = getattr(input_embeddings(built.model), "weight", None)
    if embedding is not None and embedding.ndim == 2:
        return int(embedding.shape[1])
    return int(built.model.config.get_text_config().hidden_size)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _groups(layer: Layer, scheme: QuantizationScheme) -> int:
    grouping = weight_spec(scheme.weights).grouping(tuple(layer.weight.shape))
    return -(-layer.weight.numel() // grouping.group_size)


# ---------------------------------------------------------------------- blocks


def _count_blocks(
    built: EmptyModel, schemes: Schemes, loss: str, notes: list[str]
) -> list[BlockCounts]:
    blocks = find_blocks(built.model, None)
    names = {module: name for name, module in built.model.named_modules()}
    firsts: dict[object, nn.Module] = {}
    alike = {block: firsts.setdefault(_signature(block, names, schemes), block) for block in blocks}
    trained: set[nn.Module] = {x for x, _ in schemes.values() if isinstance(x, nn.Linear)}
    try:
        costs = count_passes(built.model, alike, trained, loss)
        failure = None
    except Exception as error:
        logger.debug(f"not counted: {error!r}")
        costs, failure = {}, error
    if failure is not None:
        notes.append(
            "the model does not run without content "
            f"({type(failure).__name__}), so activations and operations are assumed from the shapes"
        )
    numbers = Counter(alike.values())
    result = [
        _block(built, block, blocks[block], numbers[block], names, schemes, costs, failure is None)
        for block in firsts.values()
    ]
    if any(not block.runs_on_text for block in result):
        notes.append(
            "blocks that text does not reach (of images or sound) are counted with as many tokens "
            "as the text, and their time is left out"
        )
    return result


def _signature(
    block: nn.Module, names: Mapping[nn.Module, str], schemes: Schemes
) -> tuple[object, ...]:
    """:return: equal for blocks that are alike"""
    found: list[object] = [type(block)]
    for name, parameter in block.named_parameters():
        owner = schemes.get(_owner(f"{names[block]}.{name}"))
        scheme = owner[1].weights if owner is not None else None
        found.append((name, tuple(parameter.shape), parameter.dtype, repr(scheme)))
    kinds = [getattr(module, "layer_type", None) for module in block.modules()]
    return (*found, repr(kinds))


def _block(
    built: EmptyModel,
    block: nn.Module,
    block_name: str,
    number: int,
    names: Mapping[nn.Module, str],
    schemes: Schemes,
    costs: Mapping[nn.Module, BlockCost],
    ran: bool,
) -> BlockCounts:
    fields: Counter[str] = Counter()
    largest = largest_expert = 0
    for module in block.modules():
        if not isinstance(module, nn.Linear):
            continue
        name, weights = names[module], module.weight.numel()
        copies, is_expert = built.copies(name), _is_expert(name)
        fields["experts" if is_expert else "dense"] += copies * weights
        fields["expert_layers"] += copies if is_expert else 0
        if name not in schemes:
            continue
        scheme = schemes[name][1]
        fields["tuned_experts" if is_expert else "tuned_dense"] += copies * weights
        fields["groups"] += copies * _groups(module, scheme)
        largest = max(largest, weights)
        largest_expert = max(largest_expert, weights if is_expert else 0)
        if scheme.input_activations is not None:
            fields["quantized_inputs"] += module.in_features
    size = sum(
        x.nbytes * built.copies(f"{block_name}.{name}") for name, x in block.state_dict().items()
    )
    per_token = getattr(built.model.config.get_text_config(), "num_experts_per_tok", None) or 1
    layers = max(1, fields["expert_layers"])
    experts = max(built.num_experts.values(), default=layers)
    fields["active"] = int(fields["experts"] * min(1.0, per_token / experts))
    cost = costs.get(block)
    return BlockCounts(
        name=block_name,
        number=number,
        size=size,
        dense=fields["dense"],
        experts=fields["experts"],
        active=fields["active"],
        tuned_dense=fields["tuned_dense"],
        tuned_experts=fields["tuned_experts"],
        groups=fields["groups"],
        expert_layers=fields["expert_layers"],
        largest=largest,
        largest_expert=largest_expert,
        quantized_inputs=fields["quantized_inputs"],
        cost=cost or _assumed_cost(built, block, fields),
        counted=cost is not None,
        runs_on_text=cost is not None or not ran,
    )


def _is_expert(name: str) -> bool:
    return re.search(r"(?:^|\.)experts\.\d+\.", name) is not None


def _assumed_cost(built: EmptyModel, block: nn.Module, fields: Counter[str]) -> BlockCost:
    """Twice the inputs and outputs of all linear layers, and of experts those of one token."""
    share = fields["active"] / fields["experts"] if fields["experts"] else 0.0
    names = {module: name for name, module in built.model.named_modules()}
    numbers = 0.0
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            name = names[layer]
            copies = built.copies(name) * share if _is_expert(name) else 1
            numbers += copies * (layer.in_features + layer.out_features)
    itemsize = built.model.dtype.itemsize
    text = built.model.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    active = fields["dense"] + fields["active"]
    return BlockCost(
        saved=Polynomial(2 * itemsize * numbers),
        products=Polynomial(2.0 * active),
        attention=Polynomial(0.0, 4.0 * _width(built)),
        heads=heads,
    )


# ---------------------------------------------------------------------- what is saved


@dataclass
class _Sum:
    parameters: int = 0
    original: int = 0
    saved: int = 0
    bits: Counter[str] = field(default_factory=Counter)


def _saved_parts(
    built: EmptyModel, schemes: Schemes, tensors: Mapping[str, torch.Tensor]
) -> Iterable[SavedPart]:
    model = built.model
    names = {module: name for name, module in model.named_modules()}
    head = names.get(model.get_output_embeddings(), "")
    embedding = names.get(input_embeddings(model) or model, "")
    sums: dict[str, _Sum] = {}

    def part(name: str) -> _Sum:
        return sums.setdefault(_part_name(model, name, head, embedding), _Sum())

    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        count, one = built.copies(name), part(name)
        one.parameters += count * tensor.numel()
        one.original += count * tensor.nbytes
        owner = schemes.get(_owner(name)) if name.endswith(".weight") else None
        bits = str(8 * tensor.itemsize) if owner is None else _bits(owner[1])
        one.bits[bits] += count * tensor.numel()
    for name, tensor in tensors.items():
        part(name).saved += built.copies(name) * tensor.nbytes
    for name, one in sums.items():
        ((bits, _),) = one.bits.most_common(1) or [("", 0)]
        yield SavedPart(name, one.parameters, one.original, one.saved, bits)


def _part_name(model: nn.Module, name: str, head: str, embedding: str) -> str:
    owner = _owner(name)
    if _is_expert(f"{owner}."):
        return "routed experts"
    if owner == embedding:
        return "embeddings"
    if owner == head:
        return "lm_head"
    try:
        module: nn.Module | None = model.get_submodule(owner)
    except AttributeError:
        module = None
    return "other linear layers" if isinstance(module, nn.Linear) else "norms, routers and others"


def _bits(scheme: QuantizationScheme) -> str:
    args = scheme.weights
    assert args is not None
    shared = f"groups of {args.group_size}" if args.group_size else f"by {args.strategy}"
    return f"{args.num_bits}, {shared}"
