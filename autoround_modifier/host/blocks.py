"""
Which modules of a model are its blocks.

LLM-Compressor takes what Transformers keeps on one device (``_no_split_modules``). That is nearly
the same, but not quite: some of these classes lie inside of others (Mamba's mixer in its block),
some hold lists of others (a whole vision encoder), some are no blocks (BERT's embeddings), and
about fifty architectures name none (BioGPT).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from compressed_tensors.utils import match_named_modules
from loguru import logger
from torch import nn

from autoround_modifier.errors import RecipeError, listed
from autoround_modifier.host.lifecycle import infer_sequential_targets

__all__ = ["declare_blocks", "find_blocks", "input_embeddings"]

Named = dict[nn.Module, str]

_LISTS = (nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module, sequential_targets: str | list[str] | None) -> Named:
    """
    The blocks are what matches, and the outermost of what lies inside of each other. Where nothing
    is asked for and the model declares nothing, they are the modules of its longest lists: all
    outermost lists of modules of one class that have several linear layers each. A warning names
    them.

    :param sequential_targets: class names, names, or expressions for names (``re:...``) of the
        blocks; None for those that the model itself declares (``_no_split_modules``)
    :return: the blocks and their names, in the order of the model; empty only if nothing was asked
        for and nothing is found
    :raises RecipeError: if ``sequential_targets`` match nothing, single layers, or the model itself
    """
    if sequential_targets is not None:
        targets = infer_sequential_targets(model, sequential_targets)
        return _asked_for(model, list(targets))
    names = _names(model)
    blocks = _declared(model, names)
    if blocks:
        return blocks
    lists = _lists_of_blocks(model, names)
    if lists:
        which = [f"{name} ({len(x)} {type(x[0]).__name__})" for name, x in lists.items()]
        logger.warning(
            f"{type(model).__name__} does not say what its blocks are; taken are the modules of "
            f"{listed(which)}. `sequential_targets` of `oneshot` names others."
        )
    return _ordered((block for blocks in lists.values() for block in blocks), names)


def declare_blocks(model: nn.Module, blocks: Named) -> None:
    """
    Let LLM-Compressor's pipeline take these blocks, where it would find others: write them into
    ``_no_split_modules`` of this instance of the model.

    :param blocks: from `find_blocks` without ``sequential_targets``
    """
    names = _names(model)
    matched = _outermost(_matches(model, _declared_targets(model)), names)
    prefixes = tuple(f"{name}." for name in matched.values())
    if all(block in matched or name.startswith(prefixes) for block, name in blocks.items()):
        return
    classes = sorted({type(block).__name__ for block in blocks})
    exact = set(_matches(model, classes)) == set(blocks)
    model._no_split_modules = set(classes if exact else blocks.values())  # type: ignore[assignment]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """:return: the token embeddings of a model; None if it has none, or does not say"""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


# ------------------------------------------------------------------ what is asked for


def _asked_for(model: nn.Module, targets: list[str]) -> Named:
    names = _names(model)
    matched = _matches(model, targets)
    if not matched:
        raise RecipeError(
            f"sequential_targets {targets} match no module; {_nearest(model, targets)}"
            f"{_remedy(model)}"
        )
    missing = [target for target in targets if not _matches(model, [target])]
    if missing:
        nearest = _nearest(model, missing)
        logger.warning(f"sequential_targets {missing} match no module; {nearest}".rstrip(" ;"))
    blocks = _outermost(matched, names)
    wrong = {
        "holds the embeddings, so it is no block": [
            name or "the model itself" for x, name in blocks.items() if _holds_model(model, x)
        ],
        "single layers, not blocks": [name for x, name in blocks.items() if _is_layer(x)],
        "lists, not blocks": [name for x, name in blocks.items() if isinstance(x, _LISTS)],
    }
    found = "; ".join(f"{listed(where)} ({what})" for what, where in wrong.items() if where)
    if found:
        raise RecipeError(f"sequential_targets {targets} match {found}; {_remedy(model)}")
    return blocks


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) or next(module.children(), None) is None


def _remedy(model: nn.Module) -> str:
    """:return: the end of a message: the classes of the blocks that the model has"""
    names = _names(model)
    blocks = _declared(model, names)
    if not blocks:
        lists = _lists_of_blocks(model, names).values()
        blocks = _ordered((block for blocks in lists for block in blocks), names)
    classes = list(dict.fromkeys(type(block).__name__ for block in blocks))
    if not classes:
        return "name the class of the model's blocks"
    return f"blocks of this model are {listed(classes)}, taken if `sequential_targets` is left out"


def _nearest(model: nn.Module, targets: list[str]) -> str:
    classes = list(dict.fromkeys(type(x).__name__ for x in model.modules()))
    near = [f"`{x}`" for y in targets for x in difflib.get_close_matches(y, classes, n=1)]
    return f"did you mean {' and '.join(dict.fromkeys(near))}? " if near else ""


# ------------------------------------------------------------------ what a model declares


def _declared_targets(model: nn.Module) -> list[str]:
    if not getattr(model, "_no_split_modules", None):
        return []  # LLM-Compressor's word for this is a string that matches no module
    return list(infer_sequential_targets(model, None))


def _declared(model: nn.Module, names: Named) -> Named:
    matched = _matches(model, _declared_targets(model))
    matched = {
        x: name
        for x, name in matched.items()
        if not _holds_model(model, x)
        and (_in_list(name) or any(isinstance(part, nn.Linear) for part in x.modules()))
    }
    blocks = _outermost(matched, names)
    # A part of a member of a list stands for the member (RoBERTa-PreLayerNorm names attention).
    return _ordered((_member(model, name) or block for block, name in blocks.items()), names)


def _member(model: nn.Module, name: str) -> nn.Module | None:
    """:return: the innermost member of a module list that is, or holds, a module"""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    return None


# ------------------------------------------------------------------ where it declares nothing


def _lists_of_blocks(model: nn.Module, names: Named) -> dict[str, list[nn.Module]]:
    """:return: by name, the outermost module lists whose members can be blocks"""
    found: dict[str, list[nn.Module]] = {}
    for module, name in names.items():
        inside = any(name.startswith(f"{other}.") for other in found)
        if inside or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        members = list(module)
        if len({type(x) for x in members}) == 1 and all(map(_could_be_block, members)):
            found[name] = members
    return found


def _could_be_block(module: nn.Module) -> bool:
    linear = sum(isinstance(part, nn.Linear) for part in module.modules())
    plain = isinstance(module, (nn.ModuleList, nn.Linear))
    return linear > 1 and not plain and len(list(module.children())) > 1


# ------------------------------------------------------------------ nested modules


def _names(model: nn.Module) -> Named:
    return {module: name for name, module in model.named_modules()}


def _matches(model: nn.Module, targets: list[str]) -> Named:
    return {module: name for name, module in match_named_modules(model, targets)}


def _in_list(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _holds_model(model: nn.Module, module: nn.Module) -> bool:
    """:return: whether a module has the model's input embeddings, so that it is called with text"""
    if module is model:
        return True
    embeddings = input_embeddings(model)
    return embeddings is not None and any(part is embeddings for part in module.modules())


def _outermost(matched: Named, names: Named) -> Named:
    """
    :return: the modules that lie in no other one. One that is no member of a list itself and holds
        a list of others, like a whole vision encoder, is left out, and these are taken
    """
    in_list = [name for name in matched.values() if _in_list(name)]
    blocks = {
        module: name
        for module, name in matched.items()
        if _in_list(name) or not any(x.startswith(f"{name}.") for x in in_list)
    }
    inside = tuple(f"{name}." for name in blocks.values())
    return {x: name for x, name in blocks.items() if not name.startswith(inside)}


def _ordered(blocks: Iterable[nn.Module], names: Named) -> Named:
    chosen = set(blocks)
    return {module: name for module, name in names.items() if module in chosen}
