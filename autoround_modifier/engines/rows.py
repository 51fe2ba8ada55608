"""What the tables of engines are made of: one row for each kernel, and for each refusal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autoround_modifier.engines.hardware import Hardware, Where
from autoround_modifier.engines.scheme import Scheme

__all__ = [
    "ASKED",
    "CHANNEL",
    "READ",
    "RELOAD",
    "RUN",
    "EngineTable",
    "Row",
    "from_file",
]

# How a row is known: docs/compatibility.md
RUN = "run"  # a checkpoint, or what was exported of it, was loaded and gave the same results
ASKED = "asked"  # code of the engine was called without the hardware, and no model was run
RELOAD = "reload"  # Transformers gave the logits of the model in memory
READ = "read"  # in the engine's source
GGUF_AUTO = "gguf:auto"
CHANNEL = -1  # the group size of scales by channel or tensor


@dataclass(frozen=True)
class Row:
    """
    One fact. The first row of a table that fits a scheme, hardware and a layer holds.

    :param families: that it is about, of `engines.scheme.FAMILIES`
    :param on: hardware; empty for any
    :param kernel: what runs it; None where the engine refuses it
    :param known: `RUN`, `RELOAD`, `ASKED` or `READ`; empty where nothing is known
    :param bits: of a weight; empty for any
    :param symmetric: None for either
    :param groups: group sizes, -1 for one scale per channel or tensor; empty for any
    :param group_multiple: of which group sizes must be; scales by channel fit
    :param formats: of compressed-tensors; empty for any. One that is not known fits
    :param strategies: of compressed-tensors; empty for any
    :param dynamic: whether scales of activations are found while the model runs; None for either
    :param experts: whether it is about experts of a mixture alone (true), other layers alone
        (false), or both (None)
    :param out_multiple: of which the output features of a layer must be
    :param in_multiple: of which the input features must be
    :param dtypes: of the unquantized activations, ``bfloat16`` or ``float16``; empty for any
    :param option: of the command that serves the model, without which the row does not hold
    :param single_group: it holds for checkpoints of one config group alone, that targets ``Linear``
    :param export: format to which the checkpoint is exported before; empty for compressed-tensors
    :param package: that must be installed beside the engine, as pip knows it; empty for none
    :param optional: it holds only where the package is installed, and is no better than what else
        there is
    :param until: first version of the engine that refuses the scheme, as `note` says
    :param note: a condition, or why the engine refuses it
    :param source: file of the engine's repository from which it is known
    """

    families: tuple[str, ...]
    on: tuple[Where, ...]
    kernel: str | None
    known: str
    bits: tuple[int, ...] = ()
    symmetric: bool | None = None
    groups: tuple[int, ...] = ()
    group_multiple: int = 1
    formats: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    dynamic: bool | None = None
    experts: bool | None = None
    out_multiple: int = 1
    in_multiple: int = 1
    dtypes: tuple[str, ...] = ()
    option: str = ""
    single_group: bool = False
    export: str = ""
    package: str = ""
    optional: bool = False
    until: str | None = None
    note: str = ""
    source: str = ""

    def fits(
        self,
        scheme: Scheme,
        hardware: Hardware,
        experts: bool,
        export: str = "",
        dtype: str | None = None,
    ) -> bool:
        """
        :param export: format to which the checkpoint is exported
        :param dtype: of the model's activations, if it is known
        :return: whether it is about such layers, whatever their shape
        """
        return (
            scheme.family in self.families
            and (not self.on or any(where.holds(hardware) for where in self.on))
            and (not self.bits or scheme.num_bits in self.bits)
            and (self.symmetric is None or scheme.symmetric == self.symmetric)
            and (not self.groups or scheme.group_size in self.groups)
            and (scheme.group_size == CHANNEL or scheme.group_size % self.group_multiple == 0)
            and (not self.formats or scheme.format is None or scheme.format in self.formats)
            and (not self.strategies or scheme.strategy in self.strategies)
            and (self.dynamic is None or scheme.dynamic == self.dynamic)
            and (self.experts is None or experts == self.experts)
            and (not self.export if not export else _is_export(self.export, export))
            and (not self.dtypes or dtype is None or dtype in self.dtypes)
        )

    def shape_problem(self, shape: tuple[int, int] | None) -> str | None:
        """
        :param shape: output and input features of a layer; None if they are not known
        :return: what the kernel needs and the layer does not have, in words
        """
        if shape is None or not (shape[0] % self.out_multiple or shape[1] % self.in_multiple):
            return None
        parts = (("output", self.out_multiple), ("input", self.in_multiple))
        needs = " and ".join(f"{side} features in multiples of {x}" for side, x in parts if x > 1)
        return f"{self.kernel} needs {needs}, and a layer has {shape[0]} x {shape[1]}"


def _is_export(of_row: str, export: str) -> bool:
    """:return: whether a row is about what is exported; ``gguf:auto`` chooses among types"""
    any_type = export == GGUF_AUTO and of_row.startswith("gguf:")
    return of_row in ("", export) or any_type


@dataclass(frozen=True)
class EngineTable:
    """
    :param engine: its name
    :param packages: of which one installs it, as pip knows them
    :param version: for which the rows hold
    :param rows: in the order in which they are looked through
    :param command: serves a checkpoint; ``{folder}``, quoted for a shell, ``{path}``, as it is, and
        ``{options}`` are filled in
    :param repository: of its source, on GitHub
    :param install: command that installs it; for a platform in `installs` that one
    :param installs: platform of `Hardware` -> command
    :param programs: executables, of which one shows that it is installed
    :param exports: formats to which a checkpoint is exported before, the best first; empty where
        the engine reads compressed-tensors
    :param export_note: what else an export needs
    :param fuses: whether it multiplies by q, k and v, and by gate and up, as one weight
    :param unpacks: whether weights are held in 16 bits in memory
    :param platforms: of `Hardware` on which it runs models that are not quantized; empty for any
    :param prefers: platforms on which it goes before engines that are no worse otherwise
    :param refusal: what is said where no row fits
    """

    engine: str
    packages: tuple[str, ...]
    version: str
    rows: tuple[Row, ...]
    command: str
    repository: str
    install: str
    installs: dict[str, str] = field(default_factory=dict, hash=False)
    programs: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    export_note: str = ""
    fuses: bool = False
    unpacks: bool = False
    platforms: tuple[str, ...] = ()
    prefers: tuple[str, ...] = ()
    refusal: str = "nothing is known of this scheme"

    def install_on(self, hardware: Hardware) -> str:
        """:return: command that installs it there"""
        return self.installs.get(hardware.platform, self.install)


def from_file(source: str, *rows: Row) -> tuple[Row, ...]:
    """:return: rows, each of which is known from one file of the engine's repository"""
    return tuple(replace(row, source=row.source or source) for row in rows)
