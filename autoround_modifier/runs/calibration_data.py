"""A digest of the calibration data, taken before the first forward pass."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from autoround_modifier.parallel import gathered

__all__ = ["NOT_READ", "calibration_digest", "calibration_size", "sample_lengths"]

# In place of a digest, of data that cannot be read twice or has no token ids.
NOT_READ = "not read beforehand"

TOKEN_IDS = ("input_ids", "decoder_input_ids")


def calibration_digest(batches: object) -> str:
    """
    Of the token ids of all samples of all processes, whatever their order, and of their loss masks.
    Padding does not count. What a sample has besides, such as images, is not read; it shows in
    the outputs of the blocks (`block_data`).

    The data is read once more than the run itself needs. That is only done where a second reading
    gives the same data and leaves no trace: the data has a length, is not its own iterator, and is
    not a `DataLoader` of an `IterableDataset`. Generators of random numbers are put back.

    :param batches: calibration data, mappings with ``input_ids``, (batch, tokens); or None
    :return: `NOT_READ` if there is none, if it cannot be read twice, or if a batch has no token ids
    """
    keys: list[bytes] | None = None
    if _can_be_read_twice(batches):
        with _random_state_kept(batches):
            keys = _sample_keys(batches)  # type: ignore[arg-type]
    shares = gathered(keys)
    if any(share is None for share in shares):
        return NOT_READ
    everywhere = sorted(key for share in shares for key in share or ())
    return hashlib.blake2b(b"".join(everywhere), digest_size=16).hexdigest()


def calibration_size(batches: object) -> int | None:
    """
    :param batches: see `calibration_digest`
    :return: number of batches of all processes; None if it is not known
    """
    sizes = gathered(len(batches) if _can_be_read_twice(batches) else None)  # type: ignore[arg-type]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def sample_lengths(batches: object) -> list[int] | None:
    """
    :param batches: see `calibration_digest`
    :return: tokens of each sample of this process, without padding; None if they cannot be read
        beforehand
    """
    if not _can_be_read_twice(batches):
        return None
    lengths = []
    with _random_state_kept(batches):
        for batch in batches:  # type: ignore[attr-defined]
            names = [x for x in TOKEN_IDS if isinstance(batch, Mapping) and x in batch]
            if not names:
                return None
            ids, mask = torch.as_tensor(batch[names[0]]), batch.get("attention_mask")
            real = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
            real = real if real.shape == ids.shape else torch.ones_like(ids)
            lengths += real.sum(-1).tolist()
    return lengths


def _can_be_read_twice(batches: object) -> bool:
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        return False
    if isinstance(batches, DataLoader):
        return not isinstance(batches.dataset, IterableDataset)
    return isinstance(batches, Sized)


@contextlib.contextmanager
def _random_state_kept(batches: object) -> Iterator[None]:
    """Let shuffling loaders give the run the samples that they would have given without us."""
    own = [
        generator
        for owner in (batches, getattr(batches, "sampler", None))
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in own]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)


def _sample_keys(batches: Iterable[Any]) -> list[bytes] | None:
    """:return: a digest of each sample; None if a batch has no token ids"""
    keys = []
    for batch in batches:
        if not isinstance(batch, Mapping):
            return None
        names = [name for name in TOKEN_IDS if batch.get(name) is not None]
        if not names:
            return None
        columns = {
            name: torch.as_tensor(batch[name])
            for name in (*names, "loss_mask")
            if batch.get(name) is not None
        }
        mask = batch.get("attention_mask")
        mask = None if mask is None else torch.as_tensor(mask)
        for row in range(len(columns[names[0]])):
            digest = hashlib.blake2b(digest_size=16)
            for name, values in columns.items():
                real = values[row]
                if mask is not None and mask[row].shape == real.shape:
                    real = real[mask[row].bool()]
                digest.update(f"{name} {real.numel()} ".encode())
                digest.update(_bytes(real))
            keys.append(digest.digest())
    return keys


def _bytes(ids: Tensor) -> bytes:
    return ids.detach().to("cpu", torch.int64).numpy().tobytes()
