"""Which engine runs which layers, with which kernel, on which hardware."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from autoround_modifier.engines.answers import EngineSupport, KernelChoice, Serving
from autoround_modifier.engines.hardware import ELSEWHERE, Hardware
from autoround_modifier.engines.layers import AlikeLayers
from autoround_modifier.engines.rows import READ, RUN, EngineTable

__all__ = ["find_kernel", "find_support"]

EXPORT = "autoround-modifier export {folder} {format} {target}"
NO_EXPORTER = "there is no export to"
# Why no engine has a kernel for types of GGUF before they are exported
DENSE = "is for llama.cpp, after `export`; the weights beside the blocks are in 16 bits"
NOT_ON = "is not known to run here"
NOTHING_TO_EXPORT = "an export is of quantized integers; its own converter takes this"


def find_kernel(
    table: EngineTable,
    layers: AlikeLayers,
    hardware: Hardware,
    *,
    single_group: bool = True,
    version: str | None = None,
    export: str = "",
    packages: Collection[str] | None = None,
    dtype: str | None = None,
) -> KernelChoice:
    """
    :param table: of the engine
    :param layers: of one scheme and shape
    :param single_group: whether the checkpoint has one config group, that targets ``Linear``
    :param version: of the engine; None for that of the table
    :param export: format to which the checkpoint is exported
    :param packages: that are installed, of those which rows name; None takes all for installed
    :param dtype: of the model's activations, ``bfloat16`` or ``float16``; None if it is not known
    """
    scheme, experts = layers.scheme, layers.experts
    label, unfit, missing = scheme.label, list[str](), None
    if scheme.family == "gguf" and not export:
        return KernelChoice(label, experts, None, READ, "", DENSE)
    for row in table.rows:
        if not row.fits(scheme, hardware, experts, export, dtype):
            continue
        if row.single_group and not single_group:
            continue
        problem = row.shape_problem(layers.shape)
        if problem is not None:
            unfit.append(problem)
            continue
        if row.optional and (packages is None or row.package not in packages):
            continue
        if row.package and packages is not None and row.package not in packages:
            missing = missing or row
            continue
        better = (missing.kernel or "", missing.package) if missing is not None else ("", "")
        if version is not None and row.until is not None and _at_least(version, row.until):
            return KernelChoice(label, experts, None, RUN, "", row.note, export, "", *better)
        refused = row.kernel is None
        return KernelChoice(
            scheme=label,
            experts=experts,
            kernel=row.kernel,
            known=row.known,
            option=row.option,
            note="; ".join(dict.fromkeys(unfit)) if refused and unfit else row.note,
            export=export,
            package=row.package,
            better=better[0],
            better_package=better[1],
            source=row.source,
        )
    note = "; ".join(dict.fromkeys(unfit)) or table.refusal
    if missing is not None:
        note = f"needs {missing.package}"
        return KernelChoice(
            label, experts, None, missing.known, "", note, export, "", missing.kernel or "",
            missing.package, missing.source,
        )  # fmt: skip
    return KernelChoice(label, experts, None, "", "", note, export)


def find_support(
    table: EngineTable,
    layers: Sequence[AlikeLayers],
    folder: str,
    hardware: Iterable[Hardware] = ELSEWHERE,
    *,
    single_group: bool = True,
    version: str | None = None,
    exportable: Mapping[str, str | None] | None = None,
    packages: Collection[str] | None = None,
    dtype: str | None = None,
) -> EngineSupport:
    """
    :param table: of the engine
    :param layers: of a checkpoint, fused where the engine fuses them; none for a checkpoint that is
        not quantized, which all engines load that need no export
    :param folder: of the checkpoint
    :param hardware: that is asked for
    :param single_group: whether it has one config group, that targets ``Linear``
    :param version: of the engine; None for that of the table
    :param exportable: format -> why the checkpoint cannot be exported to it, None if it can; a
        format that is not named has no exporter. None lets the rows decide
    :param packages: that are installed, of those which rows name; None takes all for installed
    :param dtype: of the model's activations, ``bfloat16`` or ``float16``; None if it is not known
    """
    kernels: dict[Hardware, tuple[KernelChoice, ...]] = {}
    serving: dict[Hardware, Serving] = {}
    for one in hardware:
        candidates: list[tuple[KernelChoice, ...]] = []
        if not layers and table.platforms and one.platform not in table.platforms:
            kernels[one] = (KernelChoice("16 bits", False, None, "", note=NOT_ON),)
            serving[one] = _serving(table, (), one, folder)
            continue
        for format in table.exports or ("",):
            problem = _export_problem(format, layers, exportable)
            if problem is not None:
                schemes = dict.fromkeys((x.scheme.label, x.experts) for x in layers)
                refused = [
                    KernelChoice(*scheme, None, "", note=problem, export=format)
                    for scheme in schemes or {("16 bits", False): None}
                ]
                candidates.append(tuple(refused))
                continue
            choices = [
                find_kernel(
                    table, x, one, single_group=single_group, version=version, export=format,
                    packages=packages, dtype=dtype,
                )
                for x in layers
            ]  # fmt: skip
            candidates.append(_by_scheme(layers, choices))
        kernels[one] = next(
            (x for x in candidates if all(choice.kernel is not None for choice in x)),
            _least_refused(candidates),
        )
        serving[one] = _serving(table, kernels[one], one, folder)
    return EngineSupport(table.engine, version or table.version, kernels, serving, table.unpacks)


def _export_problem(
    format: str, layers: Sequence[AlikeLayers], exportable: Mapping[str, str | None] | None
) -> str | None:
    """:return: why a checkpoint cannot be exported to a format; None if it can, or need not be"""
    if not format:
        return None
    if not layers:
        return NOTHING_TO_EXPORT
    if exportable is None:
        return None
    if format not in exportable:
        return f"{NO_EXPORTER} {format} yet"
    return exportable[format]


def _least_refused(candidates: Sequence[tuple[KernelChoice, ...]]) -> tuple[KernelChoice, ...]:
    """:return: the format for which most schemes have a kernel, the first of several; where none
    can be exported, with the reason of each"""
    if len(candidates) > 1 and all(x[0].note and not x[0].known for x in candidates):
        formats: dict[str, list[str]] = {}
        for choices in candidates:
            formats.setdefault(choices[0].note, []).append(choices[0].export)
        written = {note: names for note, names in formats.items() if NO_EXPORTER not in note}
        notes = [
            f"{', '.join(names)}: {note}" if len(written) > 1 else note
            for note, names in (written or formats).items()
        ]
        note = "; ".join(notes)
        return tuple(replace(x, note=note, export="") for x in candidates[0])

    def refusals(choices: tuple[KernelChoice, ...]) -> tuple[int, bool]:
        """What no kernel runs says more than what cannot be exported."""
        refused = [choice for choice in choices if choice.kernel is None]
        return len(refused), not any(choice.known for choice in refused)

    return min(candidates, key=refusals)


def _by_scheme(
    layers: Sequence[AlikeLayers], choices: Sequence[KernelChoice]
) -> tuple[KernelChoice, ...]:
    """:return: one choice for layers of a scheme that have the same; others with their names"""
    found: dict[KernelChoice, list[str]] = {}
    for alike, choice in zip(layers, choices, strict=True):
        found.setdefault(choice, []).extend(alike.names)
    schemes = [(choice.scheme, choice.experts) for choice in found]
    return tuple(
        choice
        if schemes.count((choice.scheme, choice.experts)) == 1
        else replace(choice, layers=tuple(dict.fromkeys(names)))
        for choice, names in found.items()
    )


def _serving(
    table: EngineTable, choices: Iterable[KernelChoice], hardware: Hardware, folder: str
) -> Serving:
    choices = list(choices)
    options = dict.fromkeys(x.option for x in choices if x.option)
    packages = dict.fromkeys(x.package for x in choices if x.package)
    format = next((x.export for x in choices if x.export), "")
    target, export = folder, ""
    if format:
        stem = folder.rstrip("/")
        name = format.replace(":", "-").replace("_", "-")
        target = f"{stem}-{format.partition(':')[2]}.gguf" if ":" in format else f"{stem}-{name}"
        export = EXPORT.format(
            folder=shlex.quote(folder), format=format, target=shlex.quote(target)
        )
    install = table.install_on(hardware)
    if packages:
        install += " " + " ".join(shlex.quote(x) for x in packages)
    command = table.command.format(
        folder=shlex.quote(target), path=target, options="".join(f" {x}" for x in options)
    )
    return Serving(install, export, table.export_note if export else "", command)


def _at_least(version: str, other: str) -> bool:
    """:return: whether one version is another, or later; by their numbers"""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:2] if part.isdigit()]

    return numbers(version) >= numbers(other)
