"""Quantizes one group of blocks after the other, each on what the quantized ones before it give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor, nn

from autoround_modifier.activations import ActivationQuantizer
from autoround_modifier.blocks.chain import QuantizedChain
from autoround_modifier.blocks.forwards import quantized_forwards
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.placement import CHAINED, HOST, RECORDED
from autoround_modifier.blocks.store import (
    BlockSamples,
    CalibrationStore,
    split_by_module_list,
)
from autoround_modifier.device import mark_memory, peak_since_mark
from autoround_modifier.errors import NonFiniteError, listed
from autoround_modifier.formats import QuantizedWeight, TunedWeight
from autoround_modifier.host.layers import Layer
from autoround_modifier.modifiers.layer_quantizer import LayerQuantizer
from autoround_modifier.modifiers.saved_blocks import SavedBlocks
from autoround_modifier.modifiers.validation import check_same_blocks
from autoround_modifier.parallel import gathered, is_distributed, wait_for_all
from autoround_modifier.progress.block_report import BlockReport, LayerReport
from autoround_modifier.progress.events import BlockFinished, phase, publish
from autoround_modifier.runs.block_data import describe_data
from autoround_modifier.runs.checkpoint import RunCheckpoint
from autoround_modifier.tuning import SampleShare, Tuner, TuningConfig, TuningResult, num_tokens

__all__ = ["BlockQuantizer", "groups_to_tune"]


@dataclass
class BlockQuantizer:
    """
    :param names: of all blocks, in the order of the model
    :param layers: quantizes the layers in them
    :param activations: that are quantized
    :param store: what the blocks saw in full precision
    :param config: of tuning; nothing is tuned if ``iters`` is 0
    :param search: start from the scale search
    :param sdpa: whether blocks run in PyTorch's scaled dot product attention
    :param quantized_inputs: whether blocks see the output of the quantized blocks before them
    :param strict: raise where a block has NaN or infinity, instead of keeping its initial rounding
    :param checkpoint: where finished blocks are kept, and found again
    :param on_iteration: called after each step with the number of blocks that took it
    :ivar reports: of the groups that were tuned
    :ivar writers: names of the groups that wrote into their arguments what later ones may read
    :ivar num_finished: number of groups that are quantized, and kept if there is a checkpoint
    """

    names: dict[nn.Module, str]
    layers: LayerQuantizer
    activations: list[ActivationQuantizer]
    store: CalibrationStore
    config: TuningConfig
    search: bool
    sdpa: bool = False
    quantized_inputs: bool = True
    strict: bool = False
    checkpoint: RunCheckpoint | None = None
    on_iteration: Callable[[int], None] = lambda num_blocks: None
    reports: list[BlockReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chain = QuantizedChain()
        self.num_finished = 0
        self.writers: list[str] = []

    def quantize(self, blocks: list[nn.Module]) -> None:
        """
        :param blocks: that have just run, to be tuned together on the output of the last
        :raises NonFiniteError: if ``strict`` and there is NaN or infinity
        :raises CheckpointError: if the checkpoint holds another group in this place
        """
        name = ", ".join(self.names[block] for block in blocks)
        captured = [self.store.pop(block) for block in blocks]
        samples = [one for one in captured if one is not None]
        in_group = {layer for block in blocks for layer in block.modules()}
        # A layer that blocks share was quantized with the first of them.
        waiting = self.layers.waiting(in_group)
        layers = [x for x in waiting if isinstance(x, nn.Linear)]
        if not layers and not self._chain.active:
            return  # nothing to tune, and nothing quantized before it
        if not all(gathered(len(samples) == len(blocks))):
            if layers and self.config.iters:
                logger.warning(f"{name}: not run once for each sample, so not tuned")
            return
        activations = [one for one in self.activations if one.module in in_group]
        targets, masks = samples[-1].outputs, samples[-1].masks
        saved: SavedBlocks | None = None
        if self.checkpoint is not None:
            one = samples[0]
            data = describe_data(one.digest, one.positions, one.inputs, targets, masks)
            saved = SavedBlocks(self.checkpoint, self.num_finished, name, data)
        chained = self._chained(name, samples[0].inputs)
        inputs = samples[0].inputs if chained is None else chained
        written = None if chained is None else self._chain.written
        group = BlockGroup(blocks, [one.calls for one in samples], activations, written)
        if self.sdpa and group.leave_out_causal_masks(inputs):
            for one in samples:
                one.calls = []  # and the masks in them
        if group.writes:
            self.writers.append(name)
        for one in samples[:-1]:
            one.outputs = []
        for one in samples:
            one.inputs = []  # only the inputs of the quantized chain are needed from here on

        found = None if saved is None else saved.restore(layers, self.layers, activations)
        if found is None:
            share = self._share(samples[-1])
            weights, report = self._learn(name, group, layers, inputs, targets, masks, share)
        else:
            weights, report = found
            logger.info(f"{name}: found finished in checkpoint_dir")
            self.on_iteration(len(blocks) * self.config.iters)
        if report is not None:
            self.reports.append(report)
            logger.info(str(report))
        publish(BlockFinished(name, report, restored=found is not None))
        wait_for_all()  # processes may share the weights, and the last one still read them
        for layer, weight in weights.items():
            self.layers.write_back(layer, weight)

        if self.quantized_inputs and blocks[-1] is not next(reversed(self.names)):
            # What blocks write into their arguments is not in a checkpoint: they run again.
            restorable = saved is not None and found is not None and not group.writes
            kept = saved.chain() if saved is not None and restorable else None
            if kept is None:
                with phase("advancing"):
                    forwards = quantized_forwards(weights, self.layers.initial.experts)
                    own_writes = group.advance(
                        inputs,
                        self.config.batch_size,
                        forwards,
                        self._place_of_chain(group, inputs),
                    )
                    self._chain.advance(inputs, targets, own_writes)
            else:
                self._chain.advance(kept, targets)
        if saved is not None and found is None:
            chain = [] if group.writes else self._chain.outputs
            saved.save(weights, self.layers, activations, report, chain)
        self.num_finished += 1

    def _chained(self, name: str, inputs: list[Tensor]) -> list[Tensor] | None:
        """:return: what the blocks will see after quantization; None where the chain ends"""
        if not self._chain.active:
            return None
        chained = self._chain.take(inputs)
        if chained is None:
            logger.info(
                f"{name}: its input is not the output of the block before it; it is tuned on "
                "full-precision inputs"
            )
            return None
        finite = all(bool(torch.isfinite(hidden).all()) for hidden in chained)
        if not all(gathered(finite)):
            self._report_failure(
                f"{name}: the output of the quantized blocks before it",
                "this block sees full-precision inputs",
            )
            return None
        return chained

    def _learn(
        self,
        name: str,
        group: BlockGroup,
        layers: list[nn.Linear],
        inputs: list[Tensor],
        targets: list[Tensor],
        masks: list[Tensor | None],
        share: SampleShare,
    ) -> tuple[dict[nn.Linear, QuantizedWeight], BlockReport | None]:
        initial = self.layers.initial
        tokens = initial.expert_tokens(layers) if self.config.iters else {}
        scarce = {x: count for x, count in tokens.items() if count < initial.min_expert_tokens}
        if scarce:
            few = listed([f"{self.layers.names[x]} ({count})" for x, count in scarce.items()])
            logger.info(
                f"{name}: {len(scarce)} of {len(initial.experts.intersection(layers))} layers of "
                f"experts saw fewer than {initial.min_expert_tokens} calibration tokens and are "
                f"quantized by the scale search alone: {few}"
            )
        with phase("search"):
            formats: dict[nn.Linear, TunedWeight] = {
                layer: initial.start(layer, self.search or layer in scarce) for layer in layers
            }
            forwards = quantized_forwards(formats, initial.experts)
            group.calibrate_activations(inputs, masks, self.config.batch_size, forwards)
            del forwards
        fixed = {
            layer: formats.pop(layer).quantized()
            for layer in layers
            if layer in scarce or not self.config.iters
        }
        if not formats:
            return fixed, None
        tuner = Tuner(
            group, formats, inputs, targets, masks, self.config, fixed, initial.experts, share
        )
        with phase("tuning"):
            result = self._tuned(name, tuner)
        if result.failure is not None:
            self._report_failure(
                f"{name}: {result.failure}", "the block keeps the rounding it started from"
            )
        tuned = {**fixed, **result.weights}
        in_order = {layer: tuned[layer] for layer in layers}
        reports = tuple(self._layer_report(x, result, tokens) for x in layers)
        report = BlockReport(
            name,
            result.initial_loss,
            result.best_loss,
            result.best_iteration,
            result.seconds,
            len(scarce),
            result.failure,
            reports,
        )
        return in_order, report

    def _place_of_chain(self, group: BlockGroup, inputs: list[Tensor]) -> torch.device:
        """:return: where to keep the inputs of the next block, which will be recorded as well"""
        needed = (RECORDED + CHAINED) * sum(x.nbytes for x in inputs)
        return self.store.placement.where_fits(group.blocks[-1], needed, group.device)

    def _tuned(self, name: str, tuner: Tuner) -> TuningResult:
        """Tune; a second time, with the samples on the host, where they leave too little memory."""
        blocks, placement, reported = tuner.group.blocks, self.store.placement, 0

        def attempt() -> TuningResult:
            done = 0

            def on_iteration() -> None:
                nonlocal done, reported
                done += 1
                if done > reported:
                    reported = done
                    self.on_iteration(len(blocks))

            return tuner.run(on_iteration)

        held, result = mark_memory(), None
        try:
            result = attempt()
        except torch.OutOfMemoryError:
            on_host = all(x.device == HOST for x in [*tuner.inputs, *tuner.targets])
            if on_host or placement.choice == "none" or is_distributed():
                raise
        if result is None:  # outside of the `except` clause, whose exception holds tensors
            placement.give_up(name)
            tuner.move_samples(HOST)
            torch.accelerator.empty_cache()
            held = mark_memory()
            result = attempt()
        placement.tuned(blocks, peak_since_mark() - held)
        return result

    def _layer_report(
        self, layer: nn.Linear, result: TuningResult, tokens: dict[Layer, int]
    ) -> LayerReport:
        name, error = self.layers.names[layer], result.errors.get(layer)
        if error is None:
            return LayerReport(name, tokens=tokens.get(layer))
        initial, final = (x if math.isfinite(x) else None for x in (error.initial, error.final))
        return LayerReport(name, initial, final, error.moved, tokens.get(layer))

    @staticmethod
    def _share(captured: BlockSamples) -> SampleShare:
        pairs = zip(captured.outputs, captured.masks, strict=True)
        counts = [num_tokens(output, mask) for output, mask in pairs]
        everywhere: dict[int, int] = {}
        for share in gathered(dict(zip(captured.positions, counts, strict=True))):
            everywhere.update(share)
        return SampleShare([everywhere[x] for x in sorted(everywhere)], captured.positions)

    def _report_failure(self, what: str, consequence: str) -> None:
        message = f"{what} has NaN or infinity; load the model in bfloat16 or float32"
        if self.strict:
            raise NonFiniteError(message)
        logger.warning(f"{message}. The run goes on without it: {consequence}")

    def release(self) -> None:
        """Drop everything captured."""
        self.store.clear()
        self._chain = QuantizedChain()


def groups_to_tune(
    model: nn.Module,
    modules: list[nn.Module],
    names: dict[nn.Module, str],
    store: CalibrationStore | None,
) -> tuple[list[list[nn.Module]], list[nn.Module]]:
    """
    :param modules: that the pipeline has just run
    :param names: of all blocks
    :param store: what was recorded; None if nothing was
    :return: the blocks among them, those together that are tuned together; and all modules,
        with those of blocks that ran although the pipeline does not know them
    """
    blocks = [module for module in modules if module in names]
    # The sequential pipeline delivers the blocks of one subgraph, to be tuned together if
    # they follow each other; the basic pipeline delivers the whole model at once.
    together = split_by_module_list(blocks, names)
    groups = [[block] for block in blocks] if model in modules else together
    if store is None:
        return groups, modules
    # Blocks that ran inside of code that LLM-Compressor does not trace, like vision encoders,
    # are in no subgraph. They come first, one by one.
    recorded = store.recorded()
    check_same_blocks([names[block] for block in recorded])
    untraced = [block for block in recorded if block not in blocks]
    inside = (part for block in untraced for part in block.modules())
    return [[block] for block in untraced] + groups, [*modules, *inside]
