"""Which backend runs which layer of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from autoround_modifier.errors import BackendError, listed
from autoround_modifier.inference.backends import BACKENDS, TRANSFORMERS, Backend, Use

__all__ = ["AUTO", "NAMES", "check_backend", "choose", "default_device", "in_words"]

AUTO = "auto"
NAMES = (AUTO, *(backend.name for backend in BACKENDS), TRANSFORMERS)


def default_device() -> torch.device:
    """:return: the accelerator, if there is one"""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def check_backend(name: str, device: torch.device) -> None:
    """
    :param name: as `load` takes it
    :param device: of the model
    :raises BackendError: if there is no such backend, or it does not run on this machine
    """
    if name not in NAMES:
        raise BackendError(f"there is no backend `{name}`; use one of {', '.join(NAMES)}")
    for backend in BACKENDS:
        missing = backend.missing(device)
        if backend.name == name and missing is not None:
            raise BackendError(
                f"the backend `{name}` {missing}. {_what_would_do(name, (), device)}"
            )


def choose(name: str, uses: Mapping[str, Use]) -> dict[str, Backend]:
    """
    :param name: of a backend for all layers, or ``auto``
    :param uses: path of each layer -> what it is used for
    :return: path of each layer -> what runs it
    :raises BackendError: if the backend does not run one of them; names them and the reason
    """
    if name == AUTO:
        return {path: _best(use) for path, use in uses.items()}
    backend = next(one for one in BACKENDS if one.name == name)
    refused: dict[str, list[str]] = {}
    for path, use in uses.items():
        reason = backend.refusal(use)
        if reason is not None:
            refused.setdefault(reason, []).append(path)
    if refused:
        reasons = [f"it {reason}: {listed(paths, 3)}" for reason, paths in refused.items()]
        some = [uses[path] for paths in refused.values() for path in paths]
        raise BackendError(
            f"the backend `{name}` does not run all layers of this checkpoint.\n  "
            + "\n  ".join(reasons)
            + f"\n{_what_would_do(name, some, some[0].device)}"
        )
    return dict.fromkeys(uses, backend)


def in_words(chosen: Mapping[str, Backend]) -> str:
    """:return: such as ``210 layers by PyTorch's 4-bit kernel, 1 by unpacking layer by layer``"""
    counts = Counter(backend.title for backend in chosen.values())
    parts = [f"{count} by {title}" for title, count in counts.most_common()]
    return ", ".join(parts).replace(" by", " layers by" if len(chosen) > 1 else " layer by", 1)


def _best(use: Use) -> Backend:
    return next(
        backend
        for backend in BACKENDS
        if backend.chosen_on(use.device)
        and backend.missing(use.device) is None
        and backend.refusal(use) is None
    )


def _what_would_do(name: str, uses: tuple[Use, ...] | list[Use], device: torch.device) -> str:
    others = [
        f"`{backend.name}`"
        for backend in BACKENDS
        if backend.name != name
        and backend.missing(device) is None
        and all(backend.refusal(use) is None for use in uses)
    ]
    return f"Here {', '.join(others)} would do, or `{AUTO}`, which may differ by layer."
