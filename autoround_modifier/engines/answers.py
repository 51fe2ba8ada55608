"""What is answered of an engine: its kernels, or why it has none, and the commands to run it."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoround_modifier.engines.hardware import Hardware

__all__ = ["EngineSupport", "KernelChoice", "Serving"]


@dataclass(frozen=True)
class KernelChoice:
    """
    What runs layers of a scheme on some hardware.

    :param scheme: its label
    :param experts: whether it is that of experts of a mixture
    :param kernel: None where the engine refuses them
    :param known: how: `RUN`, `RELOAD`, `ASKED` or `READ`; empty where nothing is known
    :param option: of the command that serves the model
    :param note: a condition, or why the layers are refused
    :param export: format to which the checkpoint is exported before; empty for none
    :param package: that must be installed beside the engine, as pip knows it; empty for none
    :param better: kernel that would be taken if `better_package` were installed; empty for none
    :param better_package: as pip knows it
    :param source: file of the engine's repository
    :param layers: names of the layers, with ``*`` for numbers, where others of the scheme have
        another kernel; empty for all of the scheme
    """

    scheme: str
    experts: bool
    kernel: str | None
    known: str
    option: str = ""
    note: str = ""
    export: str = ""
    package: str = ""
    better: str = ""
    better_package: str = ""
    source: str = ""
    layers: tuple[str, ...] = ()

    @property
    def layers_text(self) -> str:
        """Which layers it is about."""
        text = f"{self.scheme}{' experts' if self.experts else ''}"
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in self.layers)
        return f"{text} ({', '.join(leaves)})" if self.layers else text

    @property
    def kernel_text(self) -> str:
        """What runs them, with conditions, or why nothing does."""
        export = f"after export to {self.export}" if self.export and self.kernel else ""
        package = f"with {self.package}" if self.package else ""
        notes = "; ".join(x for x in (export, self.option, package, self.note) if x)
        kernel = "refused" if self.kernel is None else self.kernel
        return f"{kernel} ({notes})" if notes else kernel


@dataclass(frozen=True)
class Serving:
    """
    How a checkpoint gets to run.

    :param install: command that installs the engine and what its kernels need
    :param export: command that writes the format which the engine reads; empty for none
    :param export_note: what the export needs
    :param command: serves the checkpoint, or what was exported of it
    """

    install: str
    export: str
    export_note: str
    command: str

    @property
    def lines(self) -> str:
        """The export, if there is one, and the command."""
        return "\n".join(x for x in (self.export, self.command) if x)


@dataclass(frozen=True)
class EngineSupport:
    """
    What an engine makes of the layers of a checkpoint.

    :param engine: its name
    :param version: for which this is known
    :param kernels: hardware -> the kernels of each scheme
    :param serving: hardware -> how the checkpoint gets to run there
    :param unpacks: whether weights are held in 16 bits in memory
    """

    engine: str
    version: str
    kernels: dict[Hardware, tuple[KernelChoice, ...]] = field(hash=False)
    serving: dict[Hardware, Serving] = field(hash=False)
    unpacks: bool = False

    def loads_on(self, hardware: Hardware) -> bool:
        """:return: whether there is a kernel for each layer"""
        return all(choice.kernel is not None for choice in self.kernels[hardware])

    def export_on(self, hardware: Hardware) -> str:
        """:return: format to which the checkpoint is exported there; empty for none"""
        return next((x.export for x in self.kernels[hardware] if x.export), "")

    def reasons_on(self, hardware: Hardware) -> tuple[str, ...]:
        """:return: why it does not load there; empty if it does"""
        refused = (x for x in self.kernels[hardware] if x.kernel is None)
        return tuple(dict.fromkeys(f"{x.scheme}: {x.note}" for x in refused))

    @property
    def loads(self) -> bool:
        """Whether it does on some hardware."""
        return any(self.loads_on(hardware) for hardware in self.kernels)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not, if it does on no hardware."""
        if self.loads:
            return ()
        return tuple(dict.fromkeys(x for one in self.kernels for x in self.reasons_on(one)))

    @property
    def command(self) -> str:
        """That serves the checkpoint where it loads, with the export; on hardware where no option
        is needed, if there is some."""
        loading = [x for x in self.kernels if self.loads_on(x)] or list(self.kernels)
        plain = (x for x in loading if not any(choice.option for choice in self.kernels[x]))
        return self.serving[next(plain, loading[0])].lines
