"""What is in a checkpoint, and which engines run it: on one device, and elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround_modifier.checkpoints.check import problems_of_layout
from autoround_modifier.checkpoints.contents import (
    CheckpointContents,
    checkpoint_contents,
    refuse_other_formats,
)
from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.checkpoints.saved_files import read_layout
from autoround_modifier.engines.answers import EngineSupport
from autoround_modifier.engines.check import required_engines
from autoround_modifier.engines.environment import EngineEnvironment, this_environment
from autoround_modifier.engines.hardware import ELSEWHERE, Hardware, device_named
from autoround_modifier.engines.layers import ShapedLayer
from autoround_modifier.engines.problem import Problem
from autoround_modifier.engines.ranking import ranked
from autoround_modifier.inspection.memory import MemoryUse, memory_use
from autoround_modifier.inspection.supports import supports_of_layers

__all__ = ["CheckpointInspection", "inspect_checkpoint"]

AUTO = "auto"


@dataclass(frozen=True)
class CheckpointInspection:
    """
    :param contents: what is in the checkpoint
    :param environment: which engines are installed, and which accelerator there is
    :param device: that was asked for
    :param here: what each engine makes of the checkpoint on the device; if that is this machine's,
        by the version that is installed, or by the one that is known where it is not
    :param elsewhere: the same on all hardware, by the version that is known
    :param problems: of each engine that is checked, ``vllm``, ``sglang`` and ``transformers``:
        names, shapes and schemes that it refuses or misreads, of SGLang those of layers that it
        fuses; without those of Transformers if it does not know the model
    :param memory: what weights and key-value cache take
    """

    contents: CheckpointContents
    environment: EngineEnvironment
    device: Hardware
    here: tuple[EngineSupport, ...]
    elsewhere: tuple[EngineSupport, ...]
    problems: dict[str, list[Problem]]
    memory: MemoryUse

    @property
    def is_here(self) -> bool:
        """Whether the device is that of this machine."""
        return self.device == self.environment.hardware

    @property
    def choices(self) -> list[EngineSupport]:
        """Engines that run the checkpoint on the device as it is meant, the best first."""
        loading = (x for x in self.here if not self.misread_by(x.engine))
        return ranked(loading, self.device)

    def loads(self, engine: str) -> bool:
        """
        :param engine: ``vllm``, ``transformers`` or ``any``, which is each of them
        :return: whether it has a kernel for each scheme on some hardware, and no problem that stops
            it or makes it read another model
        :raises ValueError: if there is no such engine
        """
        supported = {support.engine.lower(): support.loads for support in self.elsewhere}
        return self._loads(engine, supported)

    def loads_here(self, engine: str) -> bool:
        """
        :param engine: as in `loads`
        :return: the same on the device that was asked for
        :raises ValueError: if there is no such engine
        """
        supported = {x.engine.lower(): x.loads_on(self.device) for x in self.here}
        return self._loads(engine, supported)

    def misread_by(self, engine: str) -> bool:
        """
        :param engine: its name, in any case
        :return: whether a problem stops it, or makes it read another model
        """
        return any(problem.fatal for problem in self.problems.get(engine.lower(), ()))

    def _loads(self, engine: str, supported: dict[str, bool]) -> bool:
        return all(
            supported[name] and name in self.problems and not self.misread_by(name)
            for name in required_engines(engine)
        )


def inspect_checkpoint(
    folder: str | os.PathLike[str],
    device: str = AUTO,
    *,
    context_length: int | None = None,
    sequences: int = 1,
) -> CheckpointInspection:
    """
    Tell what is in a checkpoint, which engines run it with which kernels, and what that takes of
    memory, from the headers of its files and its configuration alone.

    :param folder: of a checkpoint in a format of compressed-tensors, or one that is not quantized
    :param device: ``auto`` for that of this machine, ``sm75`` to ``sm120`` for an NVIDIA GPU of
        that compute capability, ``rocm``, ``xpu``, ``metal`` or ``cpu``
    :param context_length: tokens of a sequence in the key-value cache; None for 4096, or what the
        model takes if that is less
    :param sequences: at the same time
    :raises CheckpointError: if it is none, is in another format, or a file cannot be read
    :raises ValueError: if there is no such device
    """
    path, environment = Path(folder), this_environment()
    hardware = environment.hardware if device == AUTO else device_named(device)
    refuse_other_formats(path)
    layout = read_layout(path)
    contents = checkpoint_contents(path, layout)
    return CheckpointInspection(
        contents=contents,
        environment=environment,
        device=hardware,
        here=_supports(contents, layout.config, (hardware,), environment),
        elsewhere=_supports(contents, layout.config, ELSEWHERE, None),
        problems=problems_of_layout(path, layout),
        memory=memory_use(contents, layout.config, context_length, sequences),
    )


def _supports(
    contents: CheckpointContents,
    config: dict[str, Any],
    hardware: Sequence[Hardware],
    environment: EngineEnvironment | None,
) -> tuple[EngineSupport, ...]:
    """:param environment: whose engines are asked if the hardware is its own"""
    if environment is not None and tuple(hardware) != (environment.hardware,):
        environment = None

    def supports(layers: Sequence[ShapedLayer]) -> tuple[EngineSupport, ...]:
        return supports_of_layers(
            layers,
            contents.folder,
            hardware,
            unquantized=contents.unquantized_layers,
            kv_cache=contents.kv_cache is not None,
            single_group=contents.single_group,
            dtype=_dtype(config),
            environment=environment,
        )

    found = supports(contents.layers)
    if not contents.gguf_layers:
        return found
    # The weights beside the blocks are those of a model in 16 bits; an export takes the blocks.
    tuned = supports(contents.gguf_layers)
    return tuple(
        blocks if blocks.loads else dense for blocks, dense in zip(tuned, found, strict=True)
    )


def _dtype(config: dict[str, Any]) -> str | None:
    """:return: of activations; float32 models are run in 16 bits by most engines"""
    for part in (config, text_part(config)):
        found = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if found in ("bfloat16", "float16"):
            return found
    return None
