"""The tensors of a checkpoint, by the part of the model that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.gguf_schemes import GGUF_TYPES
from autoround_modifier.host.blocks import input_embeddings
from autoround_modifier.host.empty_model import EmptyModel
from autoround_modifier.host.schemes import QuantizationScheme
from autoround_modifier.modifiers.validation import Schemes
from autoround_modifier.planning.block_counts import owner_of

__all__ = ["SavedPart", "saved_parts"]


@dataclass(frozen=True)
class SavedPart:
    """
    Some tensors of the model.

    :ivar parameters: numbers in them, in the original
    :ivar original: bytes in the dtype of the loaded model
    :ivar saved: bytes in the checkpoint
    :ivar scheme: label of the scheme that most of the parameters have; a dtype where they are not
        quantized
    """

    name: str
    parameters: int
    original: int
    saved: int
    scheme: str


@dataclass
class _Sum:
    parameters: int = 0
    original: int = 0
    saved: int = 0
    schemes: Counter[str] = field(default_factory=Counter)


def saved_parts(
    built: EmptyModel,
    schemes: Schemes,
    tensors: Mapping[str, Tensor],
    gguf_types: Mapping[str, str],
) -> Iterable[SavedPart]:
    """
    :param gguf_types: layer -> name of the type of GGUF that it is tuned in
    """
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
        owner = schemes.get(owner_of(name)) if name.endswith(".weight") else None
        scheme = str(tensor.dtype).removeprefix("torch.") if owner is None else _label(owner[1])
        if owner is not None and owner_of(name) in gguf_types:
            scheme = GGUF_TYPES[gguf_types[owner_of(name)]].label
        one.schemes[scheme] += count * tensor.numel()
    for name, tensor in tensors.items():
        part(name).saved += built.copies(name) * tensor.nbytes
    for name, one in sums.items():
        ((scheme, _),) = one.schemes.most_common(1) or [("", 0)]
        yield SavedPart(name, one.parameters, one.original, one.saved, scheme)


def _part_name(model: nn.Module, name: str, head: str, embedding: str) -> str:
    owner = owner_of(name)
    if EXPERT.search(name):
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


def _label(scheme: QuantizationScheme) -> str:
    found = Scheme.of_group(scheme.model_dump(mode="json"))
    assert found is not None
    return found.label
