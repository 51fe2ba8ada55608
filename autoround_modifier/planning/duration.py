"""
Seconds of a run.

On an accelerator three shares are extrapolated from one block of Llama-3.1-8B's shape on an H200
(docs/benchmarks/gpu.md): matrix products reach 0.55 of the data sheet's speed, a pass over the
weights a ninth of the memory's, and copies of samples take as long as all three
tensors of a step at 9.3 GB/s. On a CPU the speed of matrix products is measured when the plan is
made, and steps take 1.5 times the bare block (docs/benchmarks/results.md).
"""

from __future__ import annotations

from autoround_modifier.planning.block_counts import BlockCounts
from autoround_modifier.planning.counts import ModelCounts
from autoround_modifier.planning.hardware import COPIES, Device
from autoround_modifier.planning.memory import distillation_streams, samples_on_device
from autoround_modifier.planning.quantities import Kind, Quantity
from autoround_modifier.planning.settings import RunSettings

__all__ = ["run_seconds", "step_seconds"]

REACHED_FLOPS = 0.55
REACHED_BANDWIDTH = 0.11
OF_THE_FLOOR = 1.5
# Bytes that a step reads and writes of a weight: 6 to dequantize, 2 to look for NaN, 8 to descend;
# of an expert, which is dequantized twice
STEP_BYTES, EXPERT_STEP_BYTES = 16, 22
SEARCH_PASSES, SEARCH_BYTES = 30, 6
LAUNCHES, LAUNCH = 20, 10e-6  # kernels for one layer of an expert in a step, seconds of each
# How often a step of scale distillation uses each weight: forward, again on the way back, and there
# for the gradients of input and scale
STREAMED_PASSES = 3
DISK = 2e9  # bytes per second
SAVING = 0.5e9  # bytes of the model per second, compressed and written

GPU_SOURCE = "one block on an H200, by the speed of the card"
CPU_SOURCE = "a matrix product timed now, times 1.5"


class _Speed:
    """Seconds of operations and of passes over memory on a device."""

    def __init__(self, device: Device):
        assert device.flops is not None
        if device.is_cpu:
            self.flops = device.flops / OF_THE_FLOOR
            self.bandwidth = device.bandwidth
            self.copies, self.launch = float("inf"), 0.0
        else:
            self.flops = device.flops * REACHED_FLOPS
            self.bandwidth = device.bandwidth * REACHED_BANDWIDTH
            self.copies, self.launch = COPIES, LAUNCH


def step_seconds(
    block: BlockCounts,
    run: RunSettings,
    device: Device,
    hidden: int,
    itemsize: int,
    on_device: bool = False,
) -> dict[str, float]:
    """
    :param device: with a known speed
    :param hidden: width of the block's input
    :param itemsize: bytes of one number of it
    :param on_device: whether samples are kept on the device
    :return: seconds of one iteration, by what takes them
    """
    speed, length = _Speed(device), run.length
    batch = min(run.batch_size, max(run.samples, 1))
    products = 3 * block.cost.products.of(length) + 3.5 * block.cost.attention.of(length)
    traffic = STEP_BYTES * block.tuned_dense + EXPERT_STEP_BYTES * block.tuned_experts
    copied = 0 if on_device else batch * length * (2 * hidden + length) * itemsize
    passes = run.gradient_accumulate_steps
    return {
        "matrix products": passes * batch * products / speed.flops,
        "passes over the weights": traffic / speed.bandwidth,
        "launches for experts": passes * block.expert_layers * LAUNCHES * speed.launch,
        "copies of samples": passes * copied / speed.copies,
    }


def run_seconds(counts: ModelCounts, run: RunSettings, device: Device) -> list[Quantity]:
    """
    :return: seconds of the whole run, by what takes them; nothing if the speed of the device is not
        known
    """
    if device.flops is None:
        return []
    speed = _Speed(device)
    spent: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        spent[name] = spent.get(name, 0.0) + seconds

    on_device = samples_on_device(counts, run, device)
    for block in counts.blocks:
        if not block.runs_on_text:
            continue
        of_block = _block_seconds(block, counts, run, device, speed, on_device)
        for name, seconds in of_block.items():
            add(name, block.number * seconds)
    if run.distillation_iters:
        forward = sum(
            x.number * (x.cost.products.of(run.length) + x.cost.attention.of(run.length))
            for x in counts.blocks
        )
        steps = run.distillation_iters * run.distillation_batch
        again = 1 if run.distillation_checkpointing else 0
        positions = run.length * run.distillation_positions
        head = 2 * positions * counts.hidden * counts.vocabulary
        operations = (3 * steps + run.distillation_samples) * (forward + head)
        operations += again * steps * forward
        add("scale distillation", operations / speed.flops)
        if distillation_streams(counts, device):
            recorded = run.distillation_samples / run.distillation_batch
            judged = 2 * run.distillation_holdout * recorded
            passes = STREAMED_PASSES * run.distillation_iters + recorded + judged
            path = DISK if run.model_on_disk else COPIES
            add("scale distillation: weights", passes * counts.size / path)
    kind: Kind = "extrapolated"
    source = CPU_SOURCE if device.is_cpu else GPU_SOURCE
    result = [Quantity(name, x, kind, source) for name, x in spent.items() if x]
    result.append(Quantity("loading", counts.size / DISK, "assumed", "2 GB/s"))
    saving = counts.size / SAVING
    result.append(Quantity("compressing and saving", saving, "assumed", "0.5 GB/s of the model"))
    if not device.is_cpu or run.model_on_disk:
        path = DISK if run.model_on_disk else COPIES
        moved = 2 * sum(block.number * block.size for block in counts.blocks) / path
        result.append(Quantity("blocks moved to the device and back", moved, "assumed"))
    return result


def _block_seconds(
    block: BlockCounts,
    counts: ModelCounts,
    run: RunSettings,
    device: Device,
    speed: _Speed,
    on_device: bool,
) -> dict[str, float]:
    spent: dict[str, float] = {}
    attention = block.cost.attention.of(run.length)
    forward = block.cost.products.of(run.length) + attention
    if run.samples:
        # All experts see all tokens while calibrating.
        more = 2 * run.length * (block.experts - block.active)
        recorded = run.samples * (forward + max(0, more)) / speed.flops
        spent["recording"] = recorded
    if block.tuned and (run.scale_search or run.iters):
        passes = SEARCH_PASSES if run.scale_search else 2
        spent["scale search"] = passes * SEARCH_BYTES * block.tuned / speed.bandwidth
    if not block.tuned or not run.iters:
        return spent
    steps = step_seconds(block, run, device, counts.hidden, counts.dtype.itemsize, on_device)
    for name, seconds in steps.items():
        spent[f"tuning: {name}"] = run.iters * seconds
    evaluations = (run.holdout_evaluations + 1) * run.holdout_fraction
    advance = run.samples * (1 + evaluations) * forward / speed.flops
    spent["comparing candidates, and the quantized chain"] = advance
    return spent
