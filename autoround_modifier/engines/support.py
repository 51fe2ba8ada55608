"""Which engine runs which scheme, with which kernel, on which hardware."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autoround_modifier.engines.scheme import Scheme

__all__ = [
    "ASKED",
    "CHANNEL",
    "CPU",
    "ELSEWHERE",
    "READ",
    "RELOAD",
    "ROCM",
    "RUN",
    "XPU",
    "EngineSupport",
    "EngineTable",
    "Hardware",
    "KernelChoice",
    "Row",
    "Where",
    "cuda",
    "find_kernel",
    "find_support",
    "in_words",
]

# How a row is known: docs/compatibility.md
RUN = "run"  # an unchanged checkpoint was loaded, generated text, and gave equal log-probabilities
ASKED = "asked"  # code of the engine was called without the hardware, and no model was run
RELOAD = "reload"  # Transformers gave the logits of the model in memory
READ = "read"  # in the engine's source
CHANNEL = -1  # the group size of scales by channel or tensor


@dataclass(frozen=True)
class Hardware:
    """
    :param platform: ``cuda``, ``rocm``, ``xpu`` or ``cpu``
    :param capability: compute capability of an NVIDIA GPU, times ten; 0 on other platforms
    """

    platform: str
    capability: int = 0

    def __str__(self) -> str:
        names = {"rocm": "AMD GPU", "xpu": "Intel GPU", "cpu": "CPU"}
        if self.platform != "cuda":
            return names.get(self.platform, self.platform)
        return f"NVIDIA {self.capability // 10}.{self.capability % 10}"


# What is answered for: Turing, Ampere, Ada, Hopper, and both kinds of Blackwell
ELSEWHERE = (
    *(Hardware("cuda", capability) for capability in (75, 80, 89, 90, 100, 120)),
    Hardware("rocm"),
    Hardware("xpu"),
    Hardware("cpu"),
)


@dataclass(frozen=True)
class Where:
    """
    Hardware for which a row holds.

    :param platform: of `Hardware`
    :param minimum: lowest compute capability on ``cuda``
    :param maximum: highest one
    """

    platform: str
    minimum: int = 0
    maximum: int = 999

    def holds(self, hardware: Hardware) -> bool:
        return self.platform == hardware.platform and (
            self.platform != "cuda" or self.minimum <= hardware.capability <= self.maximum
        )


def in_words(hardware: Iterable[Hardware]) -> str:
    """:return: such as ``NVIDIA 7.5+, CPU``; ``+`` where all newer GPUs that are known follow"""
    found = list(hardware)
    gpus = [one.capability for one in found if one.platform == "cuda"]
    known = [one.capability for one in ELSEWHERE if one.platform == "cuda"]
    names = [str(one) for one in found if one.platform == "cuda"]
    if len(gpus) > 1 and gpus == [x for x in known if x >= gpus[0]]:
        names = [f"{names[0]}+"]
    numbers = [name.removeprefix("NVIDIA ") for name in names]
    others = [str(one) for one in found if one.platform != "cuda"]
    return ", ".join(([f"NVIDIA {', '.join(numbers)}"] if numbers else []) + others)


ROCM, XPU, CPU = Where("rocm"), Where("xpu"), Where("cpu")


def cuda(minimum: int, maximum: int = 999) -> Where:
    """:return: NVIDIA GPUs from one compute capability to another, times ten"""
    return Where("cuda", minimum, maximum)


@dataclass(frozen=True)
class Row:
    """
    One fact. The first row of a table that fits a scheme and hardware holds.

    :param families: that it is about, of `engines.scheme.FAMILIES`
    :param on: hardware; empty for any
    :param kernel: what runs it; None where the engine refuses it
    :param known: `RUN`, `RELOAD`, `ASKED` or `READ`
    :param bits: of a weight; empty for any
    :param symmetric: None for either
    :param groups: group sizes, -1 for one scale per channel or tensor; empty for any
    :param formats: of compressed-tensors; empty for any. One that is not known fits
    :param strategies: of compressed-tensors; empty for any
    :param dynamic: whether scales of activations are found while the model runs; None for either
    :param experts: whether it is about experts of a mixture alone (true), other layers alone
        (false), or both (None)
    :param option: of the command that serves the model, without which the row does not hold
    :param single_group: it holds for checkpoints of one config group alone, that targets ``Linear``
    :param until: first version of the engine that refuses the scheme, as `note` says
    :param note: a condition, or why the engine refuses it
    """

    families: tuple[str, ...]
    on: tuple[Where, ...]
    kernel: str | None
    known: str
    bits: tuple[int, ...] = ()
    symmetric: bool | None = None
    groups: tuple[int, ...] = ()
    formats: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    dynamic: bool | None = None
    experts: bool | None = None
    option: str = ""
    single_group: bool = False
    until: str | None = None
    note: str = ""

    def fits(self, scheme: Scheme, hardware: Hardware, experts: bool) -> bool:
        return (
            scheme.family in self.families
            and (not self.on or any(where.holds(hardware) for where in self.on))
            and (not self.bits or scheme.num_bits in self.bits)
            and (self.symmetric is None or scheme.symmetric == self.symmetric)
            and (not self.groups or scheme.group_size in self.groups)
            and (not self.formats or scheme.format is None or scheme.format in self.formats)
            and (not self.strategies or scheme.strategy in self.strategies)
            and (self.dynamic is None or scheme.dynamic == self.dynamic)
            and (self.experts is None or experts == self.experts)
        )


@dataclass(frozen=True)
class EngineTable:
    """
    :param engine: its name
    :param packages: of which one installs it
    :param version: for which the rows hold
    :param rows: in the order in which they are looked through
    :param command: serves a checkpoint; ``{folder}``, quoted for a shell, ``{path}``, as it is, and
        ``{options}`` are filled in
    :param refusal: what is said where no row fits
    """

    engine: str
    packages: tuple[str, ...]
    version: str
    rows: tuple[Row, ...]
    command: str
    refusal: str = "nothing is known of this scheme"


@dataclass(frozen=True)
class KernelChoice:
    """
    What runs a scheme on some hardware.

    :param scheme: its label
    :param experts: whether it is that of experts of a mixture
    :param kernel: None where the engine refuses the scheme
    :param known: how: `RUN`, `RELOAD`, `ASKED` or `READ`; empty where nothing is known
    :param option: of the command that serves the model
    :param note: a condition, or why the scheme is refused
    """

    scheme: str
    experts: bool
    kernel: str | None
    known: str
    option: str = ""
    note: str = ""


@dataclass(frozen=True)
class EngineSupport:
    """
    What an engine makes of the schemes of a checkpoint.

    :param engine: its name
    :param version: for which this is known
    :param kernels: hardware -> the kernel of each scheme
    :param command: serves the checkpoint where it loads; without options where some hardware
        needs none
    """

    engine: str
    version: str
    kernels: dict[Hardware, tuple[KernelChoice, ...]] = field(hash=False)
    command: str

    def loads_on(self, hardware: Hardware) -> bool:
        """:return: whether there is a kernel for each scheme"""
        return all(choice.kernel is not None for choice in self.kernels[hardware])

    @property
    def loads(self) -> bool:
        """Whether it does on some hardware."""
        return any(self.loads_on(hardware) for hardware in self.kernels)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not, if it does on no hardware."""
        if self.loads:
            return ()
        refused = [
            f"{choice.scheme}: {choice.note}"
            for choices in self.kernels.values()
            for choice in choices
            if choice.kernel is None
        ]
        return tuple(dict.fromkeys(refused))


def find_kernel(
    table: EngineTable,
    scheme: Scheme,
    hardware: Hardware,
    experts: bool = False,
    single_group: bool = True,
    version: str | None = None,
) -> KernelChoice:
    """
    :param table: of the engine
    :param experts: whether the layers are experts of a mixture
    :param single_group: whether the checkpoint has one config group, that targets ``Linear``
    :param version: of the engine; None for that of the table
    """
    for row in table.rows:
        if not row.fits(scheme, hardware, experts) or (row.single_group and not single_group):
            continue
        if version is not None and row.until is not None and _at_least(version, row.until):
            return KernelChoice(scheme.label, experts, None, RUN, "", row.note)
        return KernelChoice(scheme.label, experts, row.kernel, row.known, row.option, row.note)
    return KernelChoice(scheme.label, experts, None, "", "", table.refusal)


def find_support(
    table: EngineTable,
    schemes: Sequence[tuple[Scheme, bool]],
    folder: str,
    hardware: Iterable[Hardware] = ELSEWHERE,
    single_group: bool = True,
    version: str | None = None,
) -> EngineSupport:
    """
    :param table: of the engine
    :param schemes: of the layers of a checkpoint, and whether they are those of experts; none for a
        checkpoint that is not quantized, which all engines load
    :param folder: of the checkpoint
    :param hardware: that is asked for
    :param single_group: whether it has one config group, that targets ``Linear``
    :param version: of the engine; None for that of the table
    """
    kernels = {
        one: tuple(
            find_kernel(table, scheme, one, experts, single_group, version)
            for scheme, experts in schemes
        )
        for one in hardware
    }
    loading = [x for x in kernels.values() if all(choice.kernel is not None for choice in x)]
    plain = [choices for choices in loading if not any(x.option for x in choices)]
    options = dict.fromkeys(x.option for choices in plain or loading for x in choices if x.option)
    command = table.command.format(
        folder=shlex.quote(folder), path=folder, options="".join(f" {x}" for x in options)
    )
    return EngineSupport(table.engine, version or table.version, kernels, command)


def _at_least(version: str, other: str) -> bool:
    """:return: whether one version is another, or later; by their numbers"""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:2] if part.isdigit()]

    return numbers(version) >= numbers(other)
