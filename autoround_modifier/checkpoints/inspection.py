"""What is in a checkpoint, and which engines load it: on this machine, and elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autoround_modifier.checkpoints.check import problems_of_layout
from autoround_modifier.checkpoints.contents import (
    CheckpointContents,
    checkpoint_contents,
    refuse_other_formats,
)
from autoround_modifier.checkpoints.saved_files import read_layout
from autoround_modifier.engines.check import required_engines
from autoround_modifier.engines.machine import Machine, this_machine
from autoround_modifier.engines.problem import Problem
from autoround_modifier.engines.support import EngineSupport, find_support
from autoround_modifier.engines.tables import ENGINE_TABLES

__all__ = ["CheckpointInspection", "inspect_checkpoint"]


@dataclass(frozen=True)
class CheckpointInspection:
    """
    :param contents: what is in the checkpoint
    :param machine: what this machine has
    :param here: what each engine makes of the checkpoint on this machine: by the version that is
        installed, or by the one that is known where it is not
    :param elsewhere: the same on other hardware, by the version that is known
    :param problems: of each engine that is checked, ``vllm`` and ``transformers``: names, shapes
        and schemes that it refuses or misreads; without those of Transformers if it does not know
        the model
    """

    contents: CheckpointContents
    machine: Machine
    here: tuple[EngineSupport, ...]
    elsewhere: tuple[EngineSupport, ...]
    problems: dict[str, list[Problem]]

    def loads(self, engine: str) -> bool:
        """
        :param engine: ``vllm``, ``transformers`` or ``any``, which is each of them
        :return: whether it has a kernel for each scheme on some hardware, and no problem that stops
            it or makes it read another model
        :raises ValueError: if there is no such engine
        """
        supported = {support.engine.lower(): support.loads for support in self.elsewhere}
        return all(
            supported[name] and name in self.problems and not self.misread_by(name)
            for name in required_engines(engine)
        )

    def misread_by(self, engine: str) -> bool:
        """
        :param engine: its name, in any case
        :return: whether a problem stops it, or makes it read another model
        """
        return any(problem.fatal for problem in self.problems.get(engine.lower(), ()))


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointInspection:
    """
    Tell what is in a checkpoint and which engines load it, from the headers of its files and its
    configuration alone.

    :param folder: of a checkpoint in a format of compressed-tensors, or one that is not quantized
    :raises CheckpointError: if it is none, is in another format, or a file cannot be read
    """
    path = Path(folder)
    refuse_other_formats(path)
    layout, machine = read_layout(path), this_machine()
    contents = checkpoint_contents(path, layout)
    here, elsewhere = [], []
    for table in ENGINE_TABLES:
        version = machine.engines.get(table.engine)
        known = (contents.schemes, str(path))
        here.append(
            find_support(table, *known, (machine.hardware,), contents.single_group, version)
        )
        elsewhere.append(find_support(table, *known, single_group=contents.single_group))
    problems = problems_of_layout(path, layout)
    return CheckpointInspection(contents, machine, tuple(here), tuple(elsewhere), problems)
