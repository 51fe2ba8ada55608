"""A plan as rows of text, and as plain data for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from autoround_modifier.engines.hardware import Hardware
from autoround_modifier.planning.plan import Plan
from autoround_modifier.planning.quantities import Quantity, total
from autoround_modifier.readable import bytes_text, count_text, duration_text

__all__ = ["Table", "as_data", "summary", "tables", "verdict"]

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """
    :ivar title: what is in it
    :ivar columns: their names
    :ivar rows: text, one for each column
    :ivar remarks: lines below it: where numbers that are not counted come from
    """

    title: str
    columns: Row
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()


def summary(plan: Plan) -> str:
    """:return: one line: the model, the recipe, and what decides the rest"""
    run, counts = plan.run, plan.counts
    bits = 8 * plan.checkpoint.value / counts.parameters
    text = (
        f"{plan.model}: {counts.architecture}, {count_text(counts.parameters)} parameters; "
        f"{plan.recipe}: {bits:.2f} bits per parameter as saved. "
    )
    if not run.samples:
        return text + "No calibration data."
    steps = f"{run.iters} iterations" if run.iters else "nothing is tuned"
    batches = f", batches of {run.batch_size}" if run.iters else ""
    if run.iters and run.gradient_accumulate_steps > 1:
        batches += f", {run.gradient_accumulate_steps} in each step"
    return f"{text}{steps}{batches}, {run.samples} samples of {run.length} tokens."


def tables(plan: Plan) -> list[Table]:
    """:return: device memory, host memory, disk, time and the parts of the checkpoint"""
    device = plan.machine.device
    found = []
    if not device.is_cpu:
        title = f"device memory at the peak ({plan.peak.name})"
        found.append(_sized(title, plan.peak.parts))
    found.append(_sized("host memory at the peak", plan.host))
    found.append(_sized("disk", plan.disk))
    if plan.seconds:
        rows: list[Row] = [(x.name, duration_text(x.value), x.kind) for x in plan.seconds]
        rows.append(("all", duration_text(total(plan.seconds)), "sum"))
        columns = ("part", "time", "known by")
        found.append(Table("time", columns, tuple(rows), _remarks(plan.seconds)))
    if not plan.counts.chosen:
        found.append(_parts(plan))
    if plan.device is not None:
        found.append(_kernels(plan, plan.device))
    return found


def _kernels(plan: Plan, hardware: Hardware) -> Table:
    rows = [
        (support.engine, choice.layers_text, choice.kernel_text, choice.known)
        for support in plan.engines
        for choice in support.kernels[hardware]
    ]
    title = f"engines on {hardware}, the best choice first"
    return Table(title, ("engine", "scheme", "kernel, or why there is none", "known"), tuple(rows))


def _sized(title: str, parts: Iterable[Quantity]) -> Table:
    parts = list(parts)
    rows: list[Row] = [(x.name, bytes_text(x.value), x.kind) for x in parts if x.value]
    rows.append(("all", bytes_text(total(parts)), "sum"))
    return Table(title, ("part", "size", "known by"), tuple(rows), _remarks(parts))


def _remarks(parts: Iterable[Quantity]) -> tuple[str, ...]:
    found: dict[str, list[str]] = {}
    for part in parts:
        if part.source:
            found.setdefault(f"{part.kind}: {part.source}", []).append(part.name)
    return tuple(
        text if text.startswith("extrapolated") else f"{', '.join(names)}: {text}"
        for text, names in found.items()
    )


def _parts(plan: Plan) -> Table:
    parts, original = plan.counts.parts, plan.counts.size
    rows = [
        (
            part.name,
            count_text(part.parameters),
            part.scheme,
            bytes_text(part.original),
            bytes_text(part.saved),
        )
        for part in parts
        if part.parameters or part.saved
    ]
    saved, numbers = plan.counts.saved, plan.counts.parameters
    mean = f"{8 * saved / numbers:.3f} bits in the mean"
    rows.append(("all", count_text(numbers), mean, bytes_text(original), bytes_text(saved)))
    columns = ("part", "parameters", "scheme", "as loaded", "as saved")
    return Table("tensors of the checkpoint (counted)", columns, tuple(rows))


def verdict(plan: Plan) -> list[str]:
    """:return: lines: what does not fit, and what to change; or that it fits"""
    machine = plan.machine
    if plan.fits:
        where = machine.device.name if not machine.device.is_cpu else "this CPU's memory"
        return [f"fits: {where}, {bytes_text(machine.ram)} of host memory, {machine.disk_path}"]
    names = {
        "device memory": machine.device.name,
        "host memory": "host memory",
        "disk": machine.disk_path,
    }
    lines = [f"does not fit: {x} ({names[x.resource]})" for x in plan.shortages]
    if plan.advice:
        lines.append("each of these makes it fit, with the rest as it is:")
        lines += [f"  - {change.text}" for change in plan.advice]
    else:
        lines.append("no change of the recipe makes it fit; it needs more of the above")
    if plan.fitting_devices:
        lines.append("as it is, it fits on: " + ", ".join(plan.fitting_devices))
    return lines


def as_data(plan: Plan) -> dict[str, Any]:
    """:return: all numbers, of which JSON can be made; sizes in bytes, times in seconds"""
    counts, machine = plan.counts, plan.machine

    def listed(parts: Iterable[Quantity]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(part) for part in parts]

    return {
        "model": plan.model,
        "architecture": counts.architecture,
        "parameters": counts.parameters,
        "recipe": plan.recipe,
        "settings": dataclasses.asdict(plan.run),
        "machine": {
            "device": machine.device.name,
            "device_memory": machine.device.memory,
            "ram": machine.ram,
            "disk": machine.disk,
            "disk_path": machine.disk_path,
        },
        "device": {
            "bytes": plan.peak.size,
            "phase": plan.peak.name,
            "parts": listed(plan.peak.parts),
            "phases": {phase.name: phase.size for phase in plan.phases},
        },
        "host": {"bytes": total(plan.host), "parts": listed(plan.host)},
        "disk": {"bytes": total(plan.disk), "parts": listed(plan.disk)},
        "checkpoint": {
            **dataclasses.asdict(plan.checkpoint),
            "bits_per_parameter": 8 * plan.checkpoint.value / counts.parameters,
            "parts": [dataclasses.asdict(part) for part in counts.parts],
        },
        "time": {
            "seconds": total(plan.seconds) if plan.seconds else None,
            "parts": listed(plan.seconds),
        },
        "fits": plan.fits,
        "shortages": [dataclasses.asdict(x) for x in plan.shortages],
        "advice": [dataclasses.asdict(x) for x in plan.advice],
        "fitting_devices": list(plan.fitting_devices),
        "notes": list(plan.notes),
        "engines": {
            "hardware": None if plan.device is None else str(plan.device),
            "choices": [
                {
                    "engine": support.engine,
                    "version": support.version,
                    "loads": support.loads,
                    "kernels": [
                        dataclasses.asdict(x)
                        for kernels in support.kernels.values()
                        for x in kernels
                    ],
                }
                for support in plan.engines
            ],
        },
    }
