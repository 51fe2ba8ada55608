"""What the blocks of a model are made of, each kind once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from loguru import logger
from torch import nn

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.host.blocks import find_blocks, input_embeddings
from autoround_modifier.host.empty_model import EmptyModel
from autoround_modifier.host.layers import Layer
from autoround_modifier.host.schemes import QuantizationScheme, weight_spec
from autoround_modifier.modifiers.validation import Schemes
from autoround_modifier.planning.forward_pass import BlockCost, Polynomial, count_passes

__all__ = ["BlockCounts", "count_blocks", "count_groups", "owner_of", "width_of"]


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


def count_blocks(
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
        owner = schemes.get(owner_of(f"{names[block]}.{name}"))
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
    numbers_of_experts: set[str] = set()
    for module in block.modules():
        if not isinstance(module, nn.Linear):
            continue
        name, weights = names[module], module.weight.numel()
        copies, expert = built.copies(name), EXPERT.search(name)
        routed = expert is not None
        if expert is not None:
            numbers_of_experts.add(expert[0])
        fields["experts" if routed else "dense"] += copies * weights
        fields["expert_layers"] += copies if routed else 0
        if name not in schemes:
            continue
        scheme = schemes[name][1]
        fields["tuned_experts" if routed else "tuned_dense"] += copies * weights
        fields["groups"] += copies * count_groups(module, scheme)
        largest = max(largest, weights)
        largest_expert = max(largest_expert, weights if routed else 0)
        if scheme.input_activations is not None:
            fields["quantized_inputs"] += module.in_features
    size = sum(
        x.nbytes * built.copies(f"{block_name}.{name}") for name, x in block.state_dict().items()
    )
    per_token = getattr(built.model.config.get_text_config(), "num_experts_per_tok", None) or 1
    experts = max(built.num_experts.values(), default=max(1, len(numbers_of_experts)))
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


def _assumed_cost(built: EmptyModel, block: nn.Module, fields: Counter[str]) -> BlockCost:
    """Twice the inputs and outputs of all linear layers, and of experts those of one token."""
    share = fields["active"] / fields["experts"] if fields["experts"] else 0.0
    names = {module: name for name, module in built.model.named_modules()}
    numbers = 0.0
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            name = names[layer]
            copies = built.copies(name) * share if EXPERT.search(name) else 1
            numbers += copies * (layer.in_features + layer.out_features)
    itemsize = built.model.dtype.itemsize
    text = built.model.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    active = fields["dense"] + fields["active"]
    return BlockCost(
        saved=Polynomial(2 * itemsize * numbers),
        products=Polynomial(2.0 * active),
        attention=Polynomial(0.0, 4.0 * width_of(built)),
        heads=heads,
    )


def width_of(built: EmptyModel) -> int:
    """:return: size of the hidden states"""
    embedding = getattr(input_embeddings(built.model), "weight", None)
    if embedding is not None and embedding.ndim == 2:
        return int(embedding.shape[1])
    return int(built.model.config.get_text_config().hidden_size)


def owner_of(name: str) -> str:
    """:return: name of the module of a tensor"""
    return name.rpartition(".")[0]


def count_groups(layer: Layer, scheme: QuantizationScheme) -> int:
    """:return: how many groups of weights share a scale"""
    grouping = weight_spec(scheme.weights).grouping(tuple(layer.weight.shape))
    return -(-layer.weight.numel() // grouping.group_size)
