"""One group of blocks in `checkpoint_dir`: its layers, its activations, and what comes next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from autoround_modifier.activations import ActivationQuantizer
from autoround_modifier.activations.quantizer import QPARAMS
from autoround_modifier.errors import CheckpointError, listed
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.modifiers.layer_quantizer import LayerQuantizer, check_parts
from autoround_modifier.progress.block_report import BlockReport
from autoround_modifier.runs.block_data import BlockData
from autoround_modifier.runs.checkpoint import BlockState, RunCheckpoint

__all__ = ["SavedBlocks"]

Weights = dict[nn.Linear, QuantizedWeight]


@dataclass
class SavedBlocks:
    """
    :param checkpoint: holds all groups
    :param index: number of this group, in the order in which they are tuned
    :param name: of this group
    :param data: what it saw and gave
    """

    checkpoint: RunCheckpoint
    index: int
    name: str
    data: BlockData

    def restore(
        self,
        layers: Iterable[nn.Linear],
        quantizer: LayerQuantizer,
        activations: Iterable[ActivationQuantizer],
    ) -> tuple[Weights, BlockReport | None] | None:
        """
        Nothing is changed unless all that the file holds fits.

        :param layers: of the group
        :param quantizer: knows their formats; it forgets what it recorded of them
        :param activations: in the group; their scales are set
        :return: the weights and the report; None if the group was not finished
        :raises CheckpointError: if the file is of other blocks or other data, or does not fit;
            names the tensor and what was expected
        """
        state = self.checkpoint.load(self.index, self.name, self.data)
        if state is None:
            return None
        try:
            weights, scales = _checked(state, layers, quantizer, activations)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.checkpoint.block_path(self.index)}: {error}. Delete this file alone, and "
                "start the same run again: its blocks are tuned again, and all others are kept."
            ) from error
        for layer in weights:
            quantizer.initial.forget(layer)
        for one, found in scales.items():
            one.set_scales(found)
        return weights, BlockReport.from_facts(state.facts["report"])

    def chain(self) -> list[Tensor] | None:
        """
        :return: (1, tokens, hidden) per sample of this process, what the next group will see; None
            where it is not kept, or was computed from other samples, bit by bit
        """
        return self.checkpoint.load_chain(self.index, self.data.own_digest)

    def save(
        self,
        weights: Weights,
        quantizer: LayerQuantizer,
        activations: Iterable[ActivationQuantizer],
        report: BlockReport | None,
        chain: Iterable[Tensor],
    ) -> None:
        """
        :param weights: of the layers of the group
        :param activations: in the group; those that are calibrated are saved
        :param report: None where nothing was tuned
        :param chain: what the next group will see, see `chain`; empty for nothing
        :raises OSError: if the disk is full; all files written before are as they were
        """
        facts = {"report": None if report is None else report.facts(), **self.data.facts()}
        state = BlockState(facts=facts)
        for layer, weight in weights.items():
            for part, tensor in weight.parts.items():
                state.tensors[f"{quantizer.names[layer]}.weight:{part}"] = tensor
        for one in activations:
            for part, tensor in one.scales().items():
                state.tensors[f"{_owner(one)}:{part}"] = tensor
        outputs = {str(sample): hidden for sample, hidden in enumerate(chain)}
        self.checkpoint.save(
            self.index,
            self.name,
            self.data.digest,
            state,
            BlockState(outputs, {"digest": self.data.own_digest}),
        )


def _checked(
    state: BlockState,
    layers: Iterable[nn.Linear],
    quantizer: LayerQuantizer,
    activations: Iterable[ActivationQuantizer],
) -> tuple[Weights, dict[ActivationQuantizer, dict[str, Tensor]]]:
    """
    :return: the weights of the layers; the scales of each activation
    :raises CheckpointError: if a tensor is missing, has another shape or dtype, or is not known
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.tensors.items():
        owner, _, part = name.rpartition(":")
        parts.setdefault(owner, {})[part] = tensor
    weights = {
        layer: quantizer.restored(layer, parts.pop(f"{quantizer.names[layer]}.weight", {}))
        for layer in layers
    }
    scales = {}
    for one in activations:
        scales[one] = found = parts.pop(_owner(one), {})
        if found:  # none where no sample reached it
            check_parts(_owner(one), found, _module_scales(one))
    if parts:
        raise CheckpointError(f"{listed(sorted(parts))}: not quantized in this run")
    return weights, scales


def _owner(one: ActivationQuantizer) -> str:
    return f"{one.name}.{one.base_name}"


def _module_scales(one: ActivationQuantizer) -> dict[str, Tensor]:
    """:return: the scale of an activation and what belongs to it; nothing if it is dynamic"""
    if one.statistics is None:
        return {}
    tensors = {name: getattr(one.module, f"{one.base_name}_{name}", None) for name in QPARAMS}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
