"""What a run will take, and whether a machine has it, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedConfig

from autoround_modifier import defaults
from autoround_modifier.checkpoints.mtp import promised_mtp_layers
from autoround_modifier.engines.answers import EngineSupport
from autoround_modifier.engines.hardware import Hardware, device_named
from autoround_modifier.engines.ranking import ranked
from autoround_modifier.errors import RecipeError
from autoround_modifier.host.loading import check_not_compressed, source_config, stored_format
from autoround_modifier.inspection.supports import supports_of_layers
from autoround_modifier.planning.advice import Change, changes_that_fit
from autoround_modifier.planning.counts import ModelCounts, count_model
from autoround_modifier.planning.disk import checkpoint_size, disk_parts
from autoround_modifier.planning.duration import run_seconds
from autoround_modifier.planning.exports import export_parts
from autoround_modifier.planning.hardware import DEVICES, Machine, find_machine
from autoround_modifier.planning.memory import device_phases, host_parts
from autoround_modifier.planning.quantities import Phase, Quantity, largest, total
from autoround_modifier.planning.settings import (
    RecipeParts,
    RunSettings,
    read_recipe,
    scheme_recipe,
)
from autoround_modifier.readable import bytes_text
from autoround_modifier.run_outputs import COMPRESSED_TENSORS, read_formats

__all__ = ["Plan", "Shortage", "plan"]

AUTO = "auto"
Resource = Literal["device memory", "host memory", "disk"]
# Bytes of a weight as released, where it is dequantized on loading
STORED_BYTES = {"fp8": 1.0, "mxfp4": 0.53}
# What a smaller checkpoint could have, from many bits to few
SMALLER_SCHEMES = ("W8A16", "W4A16", "W3A16G64", "W2A16G64")


@dataclass(frozen=True)
class Shortage:
    """
    :ivar resource: of which there is too little
    :ivar needed: bytes
    :ivar available: bytes
    """

    resource: Resource
    needed: float
    available: float

    def __str__(self) -> str:
        needed, available = bytes_text(self.needed), bytes_text(self.available)
        return f"{self.resource}: {needed} needed, {available} available"


@dataclass(frozen=True)
class Plan:
    """
    What a run takes. Sizes are bytes, times are seconds.

    :ivar model: name or path
    :ivar recipe: name or path, or the class of a modifier
    :ivar counts: numbers of the model and of its checkpoint that no setting changes
    :ivar run: settings that decide the rest
    :ivar machine: on which it runs
    :ivar phases: what is on the device in each phase; on a CPU, in host memory beside the model
    :ivar host: in host memory at the peak
    :ivar checkpoint: tensors of the checkpoint
    :ivar disk: written to the disk, the checkpoint among it
    :ivar seconds: of the run; empty where the speed of the device is not known
    :ivar shortages: what the machine has too little of
    :ivar advice: changes each of which makes it fit; empty if it fits, or nothing helps
    :ivar fitting_devices: of the known cards, those on which it fits as it is
    :ivar notes: what is not estimated, and why
    :ivar device: for which kernels are told; None if no hardware is known
    :ivar engines: what each engine will make of the checkpoint there, the best choice first
    """

    model: str
    recipe: str
    counts: ModelCounts
    run: RunSettings
    machine: Machine
    phases: tuple[Phase, ...]
    host: tuple[Quantity, ...]
    checkpoint: Quantity
    disk: tuple[Quantity, ...]
    seconds: tuple[Quantity, ...]
    shortages: tuple[Shortage, ...]
    advice: tuple[Change, ...]
    fitting_devices: tuple[str, ...]
    notes: tuple[str, ...]
    device: Hardware | None = None
    engines: tuple[EngineSupport, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the machine has what the run takes."""
        return not self.shortages

    @property
    def peak(self) -> Phase:
        """The phase that holds most on the device."""
        return largest(self.phases)


@dataclass(frozen=True)
class _Source:
    """
    :ivar name: of the model
    :ivar config: of the original
    :ivar dtype: of the loaded weights
    :ivar format: how they are stored; None for plain weights
    :ivar there: bytes of weights that are in the folder; 0 if they must be fetched
    :ivar mtp: number of layers for multi-token prediction
    """

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    format: str | None
    there: int
    mtp: int


def plan(
    model: str | Path | PreTrainedConfig,
    recipe: Any = defaults.RECIPE,
    *,
    scheme: str | None = None,
    max_seq_length: int | None = None,
    model_on_disk: bool = False,
    machine: Machine | None = None,
    device: str = AUTO,
    revision: str | None = None,
    trust_remote_code: bool = False,
    formats: str | Sequence[str] | None = None,
    **fields: Any,
) -> Plan:
    """
    What a run of `oneshot` will take: memory of device and host, disk, time. Nothing is loaded
    but ``config.json``: the model is built without weights.

    :param model: folder with a ``config.json``, a name on the Hub, or a configuration
    :param recipe: as in `oneshot`
    :param scheme: instead of a recipe: all linear layers but ``lm_head`` get this one, such as
        ``W4A16`` or ``W2A16G64``
    :param max_seq_length: tokens of a calibration sample; None for what `oneshot` takes
    :param model_on_disk: the model is loaded with ``device_map="auto_offload"``
    :param machine: None for this one, with the working folder's disk
    :param device: on which the checkpoint is to run: ``sm90``, ``cpu``, ... as in
        `inspect_checkpoint`; ``auto`` for that of the machine
    :param revision: of the model on the Hub
    :param trust_remote_code: let a model run its own code
    :param formats: that are written, as in `oneshot`
    :param fields: of `AutoRoundModifier`, such as ``preset`` and ``batch_size``; they replace those
        of the recipe
    :return: the plan, whether it fits or not
    :raises OSError: if the config is not there
    :raises RecipeError: if Transformers cannot build the model, the recipe is not sound, or it
        targets nothing
    :raises SchemeError: if a scheme does not fit a layer
    :raises ValueError: if there is no such device
    :raises CompressedSourceError: if the model is compressed already
    :raises ExportError: if there is no such format, or it cannot hold what the recipe makes
    """
    others = [name for name in read_formats(formats) if name != COMPRESSED_TENSORS]
    asked = None if device == AUTO else device_named(device)
    source = _source(model, revision, trust_remote_code)
    if scheme is None:
        parts = read_recipe(recipe, fields)
    else:
        parts = replace(read_recipe(scheme_recipe(scheme, **fields), {}), name=scheme)
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    run = parts.settings(max_seq_length, longest, model_on_disk)
    counts = count_model(source.config, parts, run.loss, source.dtype, trust_remote_code)
    exports = export_parts(source.config, parts, others, counts.size, trust_remote_code)
    counts = replace(counts, exports=tuple(exports))
    machine = machine or find_machine()
    made = _made(source, parts, counts, run, machine)
    asked = machine.device.hardware if asked is None else asked
    if asked is not None:
        made = replace(made, device=asked, engines=_engines(source, parts, counts, asked))
    if made.fits:
        return made

    def fits(other: RunSettings) -> bool:
        return _made(source, parts, counts, other, machine).fits

    advice = changes_that_fit(run, fits)
    if not advice and total(made.disk) - made.checkpoint.value < machine.disk:
        advice = list(_smaller_scheme(source, parts, run, machine, trust_remote_code, fields))
    cards = (
        name
        for name, device in DEVICES.items()
        if not machine.device.is_cpu
        and _made(source, parts, counts, run, replace(machine, device=device)).fits
    )
    notes = list(made.notes)
    if not advice and not run.model_on_disk:
        on_disk = _made(source, parts, counts, replace(run, model_on_disk=True), machine)
        short = "; ".join(map(str, on_disk.shortages))
        notes.append(f"with the model on the disk it would lack {short}")
    return replace(made, advice=tuple(advice), fitting_devices=tuple(cards), notes=tuple(notes))


def _engines(
    source: _Source, parts: RecipeParts, counts: ModelCounts, hardware: Hardware
) -> tuple[EngineSupport, ...]:
    """:return: what engines make of the layers as they will be saved, the best choice first"""
    supports = supports_of_layers(
        counts.layers,
        "OUTPUT",
        (hardware,),
        unquantized=counts.unquantized_layers,
        kv_cache=any(tuner.kv_cache_scheme is not None for tuner in parts.tuners),
        single_group=counts.single_group,
        dtype=str(source.dtype).removeprefix("torch."),
    )
    best = ranked(supports, hardware)
    return (*best, *(x for x in supports if x not in best))


def _source(
    model: str | Path | PreTrainedConfig, revision: str | None, trust_remote_code: bool
) -> _Source:
    if isinstance(model, PreTrainedConfig):
        raw: dict[str, Any] = model.to_dict()
        config, name, folder = model, model._name_or_path or type(model).__name__, None
    else:
        path = Path(model)
        folder = path.parent if path.is_file() else path if path.is_dir() else None
        name = str(folder or model)
        raw = source_config(name, revision)
        if not raw:
            raise FileNotFoundError(f"{name} holds no config.json")
        try:
            config = AutoConfig.from_pretrained(
                name, revision=revision or "main", trust_remote_code=trust_remote_code
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{name}: Transformers cannot read its config: {error}") from error
    method = stored_format(raw, name, revision)
    check_not_compressed(name, method)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.bfloat16
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    files = [] if folder is None else list(folder.glob("*.safetensors"))
    there = sum(path.stat().st_size for path in files)
    return _Source(name, config, dtype, method, there, promised_mtp_layers(raw))


def _made(
    source: _Source, parts: RecipeParts, counts: ModelCounts, run: RunSettings, machine: Machine
) -> Plan:
    """:return: the plan without advice"""
    phases = device_phases(counts, run, machine.device)
    peak = largest(phases)
    host = host_parts(counts, run, machine.device, peak)
    chooser = parts.chooser
    checkpoint = checkpoint_size(
        counts, None if chooser is None else chooser.avg_bits, bool(chooser and chooser.whole_model)
    )
    mtp = 0 if any(tuner.mtp == "drop" for tuner in parts.tuners) else source.mtp
    disk = disk_parts(counts, run, checkpoint, _original(source, counts), mtp)
    shortages = []
    needs: list[tuple[Resource, float, float | None]] = [
        ("device memory", peak.size, machine.device.memory),
        ("host memory", total(host), machine.ram),
        ("disk", total(disk), machine.disk),
    ]
    for resource, needed, available in needs:
        if available is not None and needed > available:
            shortages.append(Shortage(resource, needed, available))
    return Plan(
        model=source.name,
        recipe=parts.name,
        counts=counts,
        run=run,
        machine=machine,
        phases=tuple(phases),
        host=tuple(host),
        checkpoint=checkpoint,
        disk=tuple(disk),
        seconds=tuple(run_seconds(counts, run, machine.device)),
        shortages=tuple(shortages),
        advice=(),
        fitting_devices=(),
        notes=tuple(_notes(parts, counts, machine)),
    )


def _original(source: _Source, counts: ModelCounts) -> Quantity | None:
    """:return: what must be fetched; None if it is there"""
    if source.there:
        return None
    if source.format is None:
        return Quantity("the original, to be fetched", counts.size)
    linear = sum(block.number * (block.dense + block.experts) for block in counts.blocks)
    saved = linear * (counts.dtype.itemsize - STORED_BYTES[source.format])
    text = f"linear layers in {source.format}"
    return Quantity("the original, to be fetched", counts.size - saved, "assumed", text)


def _notes(parts: RecipeParts, counts: ModelCounts, machine: Machine) -> list[str]:
    notes = list(counts.notes)
    if parts.others:
        notes.append(f"not estimated: {', '.join(parts.others)}")
    if parts.chooser is not None:
        notes.append(
            "not estimated: the time in which AutoSchemeModifier measures, and its memory on the "
            "device. Which layer gets which option is not known before, so memory is that of the "
            "widest option, and the checkpoint is as large as avg_bits allows"
        )
    if len(parts.tuners) > 1:
        notes.append(
            "several AutoRoundModifiers are counted as one, with the settings of the longest"
        )
    if machine.device.flops is None:
        notes.append(
            "no time: the speed of this device is not known; --gpu takes " + ", ".join(DEVICES)
        )
    elif not machine.device.is_cpu:
        notes.append("no full-size model has been timed on a GPU; hours may be off by half")
    return notes


def _smaller_scheme(
    source: _Source,
    parts: RecipeParts,
    run: RunSettings,
    machine: Machine,
    trust_remote_code: bool,
    fields: Mapping[str, Any],
) -> list[Change]:
    """:return: the scheme of most bits with which it fits, if there is one"""
    for scheme in SMALLER_SCHEMES:
        try:
            smaller = read_recipe(scheme_recipe(scheme, **fields), {})
            counts = count_model(source.config, smaller, run.loss, source.dtype, trust_remote_code)
        except ValueError:  # its groups do not divide the layers
            continue
        if _made(source, smaller, counts, run, machine).fits:
            return [Change(f"scheme {scheme}", {})]
    return []
