"""
Finished blocks on disk, so that a run that was interrupted goes on where it stopped.

A folder holds ``run.json``, which says what the run is about; for each finished group of blocks
``block-0003.safetensors`` with its integers and scales; of the last one, what the next block will
see (``chain-0003-...``); and ``run.lock``, which keeps a second process out (`FolderLock`). A file
is either whole or not there. A block's file is the last thing that is written of it.

What a file holds is checked before it is used. Nothing is deleted but ``.unfinished-...`` and
``chain-...`` files, in a folder whose ``run.json`` is of this run, and no link is followed: the
folder's path may come from a recipe that somebody else wrote.
"""

from __future__ import annotations

import contextlib
import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoround_modifier.errors import CheckpointError
from autoround_modifier.locks import LOCK_FILE, FolderLock
from autoround_modifier.parallel import (
    gathered,
    is_source_process,
    process_rank,
    wait_for_all,
)
from autoround_modifier.progress.block_report import BlockReport
from autoround_modifier.runs.block_data import COLUMNS, BlockData
from autoround_modifier.runs.digests import DATA, MODEL, Described
from autoround_modifier.runs.files import TEMPORARY_PREFIX, atomic_file, write_atomically

__all__ = ["BlockState", "RunCheckpoint"]

RUN_FILE = "run.json"

# Key in it of what the digests are of
DESCRIBED = "described"
# Digests that are no digests, but can be read
READABLE = ("version of autoround_modifier", "modifier of the recipe")
ADVICE = {
    "version of autoround_modifier": "with that version installed",
    "code of autoround_modifier": "with the package as it was",
    "modifier of the recipe": "with a folder for each modifier of one recipe",
    MODEL: "with the original model loaded again (a run changes it in memory) in the same dtype",
    DATA: "with the same dataset, tokenizer, `num_calibration_samples` and `max_seq_length`",
}


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
    Several processes of one job share a folder; the first of them locks it and writes.

    :param folder: ``checkpoint_dir``; made if it is not there
    :param run: digests of all that the result depends on, by what they are of, such as ``model``
    :param described: what can be said of each in a message, see `run_description`
    :raises CheckpointError: if the folder holds another run, or another process uses it
    :raises OSError: if the folder cannot be written to
    """

    def __init__(self, folder: Path, run: dict[str, str], described: Described | None = None):
        self.folder = folder
        self._described = described or {}
        self._lock: FolderLock | None = None
        self._warned = False
        problem: Exception | None = None
        if is_source_process():
            try:
                with self._naming_the_folder():
                    self._open(run)
            except (CheckpointError, OSError) as error:
                self.close()
                problem = error
        # All processes stop, not only the one that found the problem.
        for found in gathered(problem):
            if found is not None:
                raise found

    def _open(self, run: dict[str, str]) -> None:
        self._check_is_ours(run)  # before a lock file is put there
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder)
        weakref.finalize(self, self._lock.release)
        self._check_is_ours(run)
        # also where it is there: a folder that cannot be written to is found out now
        content = {**run, DESCRIBED: self._described}
        write_atomically(self.folder / RUN_FILE, json.dumps(content, indent=1) + "\n")
        for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            if leftover.is_file() and not leftover.is_symlink():
                leftover.unlink()

    def _check_is_ours(self, run: dict[str, str]) -> None:
        """:raises CheckpointError: if the folder holds anything but this run"""
        path = self.folder / RUN_FILE
        _refuse_link(path)
        _refuse_link(self.folder / LOCK_FILE)
        earlier = self._earlier_run(path)
        if earlier is not None:
            different = [name for name in run if earlier.get(name) != run[name]]
            if different:
                raise CheckpointError(self._how_runs_differ(different, earlier, run))
        elif not path.exists() and any(
            not x.name.startswith(TEMPORARY_PREFIX) and x.name != LOCK_FILE
            for x in self.folder.glob("*")
        ):
            raise CheckpointError(
                f"checkpoint_dir {self.folder} holds other files and no {RUN_FILE}; choose an "
                "empty folder"
            )

    def _earlier_run(self, path: Path) -> dict[str, Any] | None:
        """
        :return: what ``run.json`` holds; None if it is not there, or is damaged and nothing is
            lost with it
        """
        if not path.exists():
            return None
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(earlier, dict):
                return earlier
            reason = "it is not a mapping"
        except ValueError as error:
            reason = str(error)
        finished = self._num_finished()
        if finished == 0:
            return None
        raise CheckpointError(
            f"{path} cannot be read ({reason}), and without it nobody knows which run the "
            f"{finished} finished groups of blocks in this folder are of. Put the file back from a "
            "copy, or choose another checkpoint_dir."
        )

    def _how_runs_differ(
        self, different: list[str], earlier: dict[str, Any], run: dict[str, str]
    ) -> str:
        """:return: what differs, with old and new values; and how to lose nothing"""
        before = earlier.get(DESCRIBED)
        before = before if isinstance(before, dict) else {}
        facts, advice = [], []
        for name in different:
            known = before.get(name)
            values = _differences(known if isinstance(known, dict) else {}, self._described, name)
            if name not in self._described and name in READABLE:
                values = [f"{earlier.get(name)} there, {run[name]} here"]
            facts.append(f"another {name}" + (f" ({'; '.join(values)})" if values else ""))
            if name in ADVICE:
                advice.append(ADVICE[name])
        finished = self._num_finished()
        how = ": " + "; ".join(advice) if advice else ""
        going_on = (
            f"To go on after its {finished} finished groups of blocks, start it as it was{how}. To "
            "start anew, choose another checkpoint_dir; this one stays as it is."
            if finished
            else "It has no finished blocks yet: choose another checkpoint_dir, or delete this one."
        )
        return f"checkpoint_dir {self.folder} holds a run with {' and '.join(facts)}. {going_on}"

    def _num_finished(self) -> int:
        return len(list(self.folder.glob("block-*.safetensors")))

    def close(self) -> None:
        """Let other processes use the folder. Nothing happens if it is closed already."""
        if self._lock is not None:
            self._lock.release()

    def load(self, index: int, name: str, data: BlockData) -> BlockState | None:
        """
        Finished blocks whose activations differ here in their last bits only are taken, with one
        warning: the result is then not bit by bit that of an uninterrupted run on one machine.

        :param index: number of the group of blocks, in the order in which they are tuned
        :param name: of the group
        :param data: what its blocks saw and gave
        :return: its state, or None if it was not finished; its facts are complete
        :raises CheckpointError: if it is that of other blocks or of other calibration data, or is
            damaged
        """
        path = self.block_path(index)
        exists = gathered(path.exists())
        if not any(exists):
            return None
        if not all(exists):
            raise CheckpointError(
                f"not all processes see {path}; checkpoint_dir must be one folder for all of them"
            )
        state = _read(path)
        _check_facts(path, state.facts)
        if state.facts["name"] != name:
            raise CheckpointError(
                f"{path} is of {state.facts['name']}, where this run has {name}: the model is cut "
                "into other groups of blocks. To go on with the finished ones, give `oneshot` the "
                "`sequential_targets`, `sequential_targets_per_subgraph` and `pipeline` of the run "
                "that made them; to start anew, choose another checkpoint_dir."
            )
        if state.facts["digest"] != data.digest:
            difference = data.difference(state.facts)
            if difference is None:
                raise CheckpointError(
                    f"{path}: {name} was tuned on other calibration data, or the model gives other "
                    f"outputs here: {data.explained(state.facts)}. To go on with the finished "
                    "blocks, start the run as it was; to start anew, choose another checkpoint_dir."
                )
            if not self._warned:
                logger.warning(
                    f"{path}: {name} was tuned with activations that differ slightly from those of "
                    f"this machine (means of a sample by up to {difference:.1e}), as they do on "
                    "another device, driver or version of PyTorch. The run goes on, but its result "
                    "has not exactly the integers of a run on one machine."
                )
            self._warned = True
        return state

    def load_chain(self, index: int, digest: str) -> list[Tensor] | None:
        """
        :param digest: of the samples of this process, bit by bit, `BlockData.own_digest`
        :return: (1, tokens, hidden) per sample, what the next block will see; None where it was not
            kept, or is that of other samples
        """
        path = self._chain_path(index)
        if not path.exists():
            return None
        try:
            chain = _read(path)
        except CheckpointError:
            if path.is_symlink():
                raise
            logger.warning(f"{path} is damaged; it is computed again from the finished blocks")
            return None
        names = [str(sample) for sample in range(len(chain.tensors))]
        if set(names) != set(chain.tensors):
            return None
        if chain.facts.get("digest") != digest:
            return None
        return [chain.tensors[name] for name in names]

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
                _write(self.block_path(index), BlockState(state.tensors, facts))
            wait_for_all()
            self._chain_path(index - 1).unlink(missing_ok=True)

    def block_path(self, index: int) -> Path:
        """:return: the file of a group of blocks, which may not be there"""
        return self.folder / f"block-{index:04d}.safetensors"

    def _chain_path(self, index: int) -> Path:
        rank, size = process_rank()
        return self.folder / f"chain-{index:04d}-{rank + 1}-of-{size}.safetensors"

    @contextlib.contextmanager
    def _naming_the_folder(self, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            finished = self._num_finished()
            what = "" if name is None else f" {name} could not be saved;"
            kept = f" {finished} finished groups of blocks are kept there." if finished else ""
            said = (
                f"checkpoint_dir {self.folder} cannot be written to ({error.strerror or error})."
                f"{what}{kept} Free disk space or fix its permissions, then start the same run "
                "again"
            )
            # that of safetensors has no number
            numbered = (said,) if error.errno is None else (error.errno, said)
            raise OSError(*numbered) from error


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
    """:raises CheckpointError: if the file is damaged, or is a link"""
    _refuse_link(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(facts, dict):
        raise _damaged(path, "its facts are not a mapping")
    return BlockState(tensors, facts)


def _check_facts(path: Path, facts: dict[str, Any]) -> None:
    """:raises CheckpointError: if what a block's file says of itself is incomplete"""
    for name in ("name", "digest", "order"):
        if not isinstance(facts.get(name), str):
            raise _damaged(path, f"its `{name}` is missing")
    samples = facts.get("samples")
    if not isinstance(samples, list) or not all(_is_row(row) for row in samples):
        raise _damaged(path, f"its `samples` are not rows of {COLUMNS} finite numbers")
    try:
        BlockReport.from_facts(facts.get("report"))
    except ValueError as error:
        raise _damaged(path, f"its `report`: {error}") from error


def _is_row(row: object) -> bool:
    return (
        isinstance(row, list)
        and len(row) == COLUMNS
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in row)
    )


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a link to another file. checkpoint_dir holds files only; choose another"
        )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({reason}); delete this file alone, and start the same run again: its "
        "blocks are tuned again, and all others are kept"
    )


def _differences(earlier: dict[str, Any], described: Described, name: str) -> list[str]:
    """:return: which values differ of what is known of two runs"""
    here = described.get(name, {})
    fields = [x for x in dict.fromkeys([*earlier, *here]) if earlier.get(x) != here.get(x)]
    if not earlier:
        return []  # an earlier version did not write them down
    if not fields and name == MODEL:
        return ["the same class and size with other weights"]
    return [f"{x}: {_short(earlier.get(x))} there, {_short(here.get(x))} here" for x in fields]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
