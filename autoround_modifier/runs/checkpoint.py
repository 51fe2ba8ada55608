"""
Finished blocks on disk, so that a run that was interrupted goes on where it stopped.

A folder holds ``run.json``, which says what the run is about; for each finished group of blocks
``block-0003.safetensors`` with its integers and scales; and, of the last one, what the next block
will see (``chain-0003-...``). A file is either whole or not there. A block's file is the last thing
that is written of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoround_modifier.errors import CheckpointError
from autoround_modifier.parallel import (
    gathered,
    is_source_process,
    process_rank,
    wait_for_all,
)
from autoround_modifier.runs.files import TEMPORARY_PREFIX, atomic_file, write_atomically

__all__ = ["BlockState", "RunCheckpoint"]

RUN_FILE = "run.json"


@dataclass
class BlockState:
    """
    What is known of a finished group of blocks.

    :ivar tensors: by name, on the CPU
    :ivar facts: JSON values
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class RunCheckpoint:
    """
    :param folder: ``checkpoint_dir``; made if it is not there
    :param run: digests of all that the result depends on, by what they are of, such as ``model``
    :raises CheckpointError: if the folder holds another run
    :raises OSError: if the folder cannot be written to
    """

    def __init__(self, folder: Path, run: dict[str, str]):
        self.folder = folder
        if is_source_process():
            with self._naming_the_folder():
                self._open(run)
        wait_for_all()

    def _open(self, run: dict[str, str]) -> None:
        path = self.folder / RUN_FILE
        if path.exists():
            try:
                earlier = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{path} cannot be read ({error}); delete it") from error
            different = [name for name in run if earlier.get(name) != run[name]]
            if different:
                raise CheckpointError(
                    f"checkpoint_dir {self.folder} holds a run with another "
                    f"{' and another '.join(different)}. Choose another folder, or delete this one "
                    "if its blocks are not needed."
                )
        elif any(not x.name.startswith(TEMPORARY_PREFIX) for x in self.folder.glob("*")):
            raise CheckpointError(
                f"checkpoint_dir {self.folder} holds other files and no {RUN_FILE}; choose an "
                "empty folder"
            )
        for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink()
        # also where it is there: a folder that cannot be written to is found out now
        write_atomically(path, json.dumps(run, indent=1) + "\n")

    def load(self, index: int, name: str, digest: str) -> BlockState | None:
        """
        :param index: number of the group of blocks, in the order in which they are tuned
        :param name: of the group
        :param digest: of what its blocks saw and gave, `data_digest`
        :return: its state, or None if it was not finished
        :raises CheckpointError: if it is that of other blocks or of other calibration data
        """
        path = self._block_path(index)
        exists = gathered(path.exists())
        if not any(exists):
            return None
        if not all(exists):
            raise CheckpointError(
                f"not all processes see {path}; checkpoint_dir must be one folder for all of them"
            )
        state = _read(path)
        if state.facts["name"] != name:
            raise CheckpointError(
                f"{path} is of {state.facts['name']}, where this run has {name}: the model is cut "
                "into other groups of blocks. Choose another checkpoint_dir."
            )
        if state.facts["digest"] != digest:
            raise CheckpointError(
                f"{path}: {name} was tuned on other calibration data, or gives other outputs here. "
                "Pass the same dataset, or choose another checkpoint_dir."
            )
        return state

    def load_chain(self, index: int, digest: str) -> list[Tensor] | None:
        """
        :param digest: of the samples of this process, `data_digest`
        :return: (1, tokens, hidden) per sample, what the next block will see; None where it was not
            kept, or is that of other samples
        """
        path = self._chain_path(index)
        if not path.exists():
            return None
        chain = _read(path)
        if chain.facts["digest"] != digest:
            return None
        return [chain.tensors[str(sample)] for sample in range(len(chain.tensors))]

    def save(
        self, index: int, name: str, digest: str, state: BlockState, chain: BlockState
    ) -> None:
        """
        :param chain: what `load_chain` gives, by the numbers of the samples; the digest among its
            facts
        :raises OSError: if the disk is full; all files written before are as they were
        """
        with self._naming_the_folder(name):
            if chain.tensors:
                _write(self._chain_path(index), chain)
            wait_for_all()
            if is_source_process():
                facts = {**state.facts, "name": name, "digest": digest}
                _write(self._block_path(index), BlockState(state.tensors, facts))
            wait_for_all()
            self._chain_path(index - 1).unlink(missing_ok=True)

    def _block_path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def _chain_path(self, index: int) -> Path:
        rank, size = process_rank()
        return self.folder / f"chain-{index:04d}-{rank + 1}-of-{size}.safetensors"

    @contextlib.contextmanager
    def _naming_the_folder(self, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            finished = len(list(self.folder.glob("block-*.safetensors")))
            what = "" if name is None else f" {name} could not be saved;"
            kept = f" {finished} finished groups of blocks are kept there." if finished else ""
            raise OSError(
                error.errno,
                f"checkpoint_dir {self.folder} cannot be written to ({error.strerror or error})."
                f"{what}{kept} Free disk space or fix its permissions, then start the same run "
                "again",
            ) from error


def _write(path: Path, state: BlockState) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()  # safetensors refuses what shares memory
        storages.add(storage)
        tensors[name] = tensor
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"facts": json.dumps(state.facts)})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error


def _read(path: Path) -> BlockState:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return BlockState(tensors, json.loads(file.metadata()["facts"]))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it, and its block is tuned again"
        ) from error
