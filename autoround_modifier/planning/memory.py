"""
Memory of a run, phase by phase, in bytes.

Beyond what shapes and the code say, two numbers are measured: on a CPU activations take a multiple
of what autograd saves (`CPU_ACTIVATIONS`), and a process with all libraries imported has a size.
"""

from __future__ import annotations

import torch

from autoround_modifier.blocks.placement import CHAINED, RECORDED, RESERVE
from autoround_modifier.device import slice_elements
from autoround_modifier.distillation.residency import fits
from autoround_modifier.distillation.teacher import ACCELERATOR_LOGITS, CPU_LOGITS
from autoround_modifier.planning.block_counts import BlockCounts
from autoround_modifier.planning.counts import ModelCounts
from autoround_modifier.planning.hardware import Device
from autoround_modifier.planning.quantities import Phase, Quantity
from autoround_modifier.planning.settings import RunSettings

__all__ = ["SAVED", "device_phases", "distillation_streams", "host_parts", "samples_on_device"]

# Float32 minimum, maximum, alpha and beta; scale (2) and zero point (1) of the best candidate and
# of the module
GROUP_BYTES = 22
# Scores, scores with the mask and the result in 16 bits, softmax in float32: of each pair of tokens
# in each head of Transformers' eager attention
EAGER_BYTES = 10
# Float32 weight, quotient, integers and error of a slice that is rounded
ROUNDING_BYTES = 16
CPU_ACTIVATIONS = 3.0
CPU_SOURCE = "3 times what is saved, measured on a CPU (docs/benchmarks/memory.md)"
CONTEXT = 1.0e9  # CUDA's context and libraries, and fragments of the allocator
PROCESS = 1.0e9  # a process that has imported PyTorch, Transformers and LLM-Compressor
PROCESS_ON_GPU = 2.5e9  # and has initialised CUDA
TEACHER_BYTES = 2048  # of each token: 256 token ids and their probabilities
# Float32 scale, its gradient and Adam's two moments
TRAINED_SCALE_BYTES = 16

SAVED = "saved for the backward pass"
MASKS = "masks of a step"


def device_phases(counts: ModelCounts, run: RunSettings, device: Device) -> list[Phase]:
    """
    :param device: on a CPU, what is on the device is in host memory, beside the model
    :return: phases that hold most on the device, at least one
    """
    phases = _all_block_phases(counts, run, device)
    if samples_on_device(counts, run, device):
        kept = Quantity("calibration samples", _kept_samples(counts, run))
        phases = [Phase(phase.name, (*phase.parts, kept)) for phase in phases]
    scratch = min(counts.outside, _slice_elements(device)) * ROUNDING_BYTES
    if counts.outside:
        own = counts.outside * counts.dtype.itemsize
        parts = [Quantity("rounding", scratch)]
        if not _in_place(device, run):
            parts.insert(0, Quantity("weight", own))
        phases.append(Phase("layers outside of blocks", tuple(parts)))
    if run.samples and not device.is_cpu:
        hidden = run.length * counts.hidden * counts.dtype.itemsize
        parts = [Quantity("weight", counts.embeddings), Quantity("a sample", hidden)]
        phases.append(Phase("token embeddings", tuple(parts)))
    if run.distillation_iters:
        phases.append(_distillation(counts, run, device))
    if not device.is_cpu:
        reserve = Quantity("CUDA and its allocator", CONTEXT, "assumed")
        phases = [Phase(phase.name, (*phase.parts, reserve)) for phase in phases]
    return phases


def samples_on_device(counts: ModelCounts, run: RunSettings, device: Device) -> bool:
    """:return: whether blocks are tuned with their samples on the accelerator"""
    if device.is_cpu or not run.iters or run.offload_device == "cpu":
        return False
    if run.offload_device == "none":
        return True
    if device.memory is None:
        return False
    phases = _all_block_phases(counts, run, device)
    needed = max((phase.size for phase in phases), default=0.0) + _kept_samples(counts, run)
    return needed <= (1 - RESERVE) * (device.memory - CONTEXT)


def _kept_samples(counts: ModelCounts, run: RunSettings) -> float:
    """:return: bytes of what a block takes and gives, what it takes in the chain, and masks"""
    numbers = run.length * ((RECORDED + CHAINED) * counts.hidden + run.length)
    return run.samples * numbers * counts.dtype.itemsize


def _all_block_phases(counts: ModelCounts, run: RunSettings, device: Device) -> list[Phase]:
    """:return: without calibration samples that are kept"""
    return [phase for block in counts.blocks for phase in _block_phases(block, counts, run, device)]


def _slice_elements(device: Device) -> int:
    """:return: how many numbers are rounded at once"""
    return slice_elements(torch.device("cpu" if device.is_cpu else "cuda"))


def _in_place(device: Device, run: RunSettings) -> bool:
    """:return: whether the weights that are computed with are those of the model in memory"""
    return device.is_cpu and not run.model_on_disk


def _block_phases(
    block: BlockCounts, counts: ModelCounts, run: RunSettings, device: Device
) -> list[Phase]:
    parts = []
    if not _in_place(device, run):
        parts.append(Quantity("weights of the block", block.size))
    itemsize = counts.dtype.itemsize
    phases = []
    if run.samples:
        heads = max(block.cost.heads, 1)
        phases.append(
            Phase(
                f"recording {block.name}",
                (
                    *parts,
                    Quantity("eager attention of a sample", EAGER_BYTES * heads * run.length**2),
                    Quantity("activations of a sample", block.cost.saved.of(run.length)),
                ),
            )
        )
    if not block.tuned:
        return phases or [Phase(f"running {block.name}", tuple(parts))]
    rounding = min(block.largest, _slice_elements(device)) * ROUNDING_BYTES
    if not run.iters:
        found = Quantity("groups", GROUP_BYTES * block.groups)
        phases.append(
            Phase(f"quantizing {block.name}", (*parts, found, Quantity("rounding", rounding)))
        )
        return phases
    phases.append(Phase(f"tuning {block.name}", (*parts, *_tuning(block, run, itemsize, device))))
    return phases


def _tuning(block: BlockCounts, run: RunSettings, itemsize: int, device: Device) -> list[Quantity]:
    batch, length = min(run.batch_size, max(run.samples, 1)), run.length
    saved = batch * block.cost.saved.of(length)
    saved += batch * length * block.quantized_inputs * itemsize
    kind, source = ("counted", "") if block.counted else ("assumed", "")
    if device.is_cpu:
        saved, kind, source = CPU_ACTIVATIONS * saved, "extrapolated", CPU_SOURCE
    parts = [
        Quantity("V", 2 * block.tuned),
        Quantity("best integers", block.tuned),
        Quantity("dequantized weights, and gradients", 2 * itemsize * block.tuned_dense),
        Quantity("ranges and scales of groups", GROUP_BYTES * block.groups),
        Quantity(SAVED, saved, kind, source),  # type: ignore[arg-type]
        Quantity(MASKS, itemsize * batch * length**2),
    ]
    if block.tuned_experts:
        one = Quantity("weight and gradient of one expert", 2 * itemsize * block.largest_expert)
        parts.append(one)
        if run.gradient_accumulate_steps > 1:
            kept = itemsize * block.tuned_experts
            parts.append(Quantity("gradients of experts between passes", kept))
    return parts


def distillation_streams(counts: ModelCounts, device: Device) -> bool:
    """:return: whether scale distillation brings each weight to the device when it is used"""
    if device.is_cpu or device.memory is None:
        return False
    return not fits(counts.size, device.memory - CONTEXT)


def _distillation(counts: ModelCounts, run: RunSettings, device: Device) -> Phase:
    itemsize, tokens = counts.dtype.itemsize, run.distillation_batch * run.length
    logits = tokens * run.distillation_positions * counts.vocabulary
    at_once = CPU_LOGITS if device.is_cpu else ACCELERATOR_LOGITS
    saved = [run.distillation_batch * x.cost.saved.of(run.length) for x in counts.blocks]
    numbers = [block.number for block in counts.blocks]
    if run.distillation_checkpointing:
        activations = max(saved, default=0.0)
        inputs = counts.num_blocks * tokens * counts.hidden * itemsize
    else:
        activations = sum(n * x for n, x in zip(numbers, saved, strict=True))
        inputs = 0
    parts = [
        Quantity("scales, gradients and moments", TRAINED_SCALE_BYTES * counts.quantized_groups),
        Quantity("inputs of blocks", inputs),
        Quantity("activations", activations),
        Quantity("logits and their gradients", 2 * itemsize * logits, "assumed"),
        Quantity("logits in float32", 4 * min(logits, at_once), "assumed"),
    ]
    if distillation_streams(counts, device):
        largest = max((block.largest for block in counts.blocks), default=0)
        # the layer that runs, the one before it on the way back, and integers of one
        parts.append(Quantity("weights of layers that run", (2 * itemsize + 1) * largest))
        parts.append(Quantity("embeddings and head", 2 * counts.embeddings))
    else:
        parts.append(Quantity("integers", counts.quantized))
        if not device.is_cpu:
            parts.append(Quantity("the whole model", counts.size))
    return Phase("scale distillation", tuple(parts))


def host_parts(
    counts: ModelCounts, run: RunSettings, device: Device, on_device: Phase
) -> list[Quantity]:
    """
    :param on_device: the largest phase, which on a CPU is in host memory
    :return: what is in host memory at the peak
    """
    itemsize, tokens = counts.dtype.itemsize, run.samples * run.length
    states = tokens * counts.hidden * itemsize
    masks = run.samples * run.length**2 * itemsize
    process = PROCESS if device.is_cpu else PROCESS_ON_GPU
    parts = [Quantity("the process and its libraries", process, "assumed")]
    if not run.model_on_disk:
        parts.append(Quantity("the model", counts.size))
    parts.append(Quantity("blocks of GGUF, until they are saved", counts.gguf_blocks))
    if tokens:
        parts.append(Quantity("outputs in the pipeline's cache", states))
        # those of the first block, also where the others' are on the device
        captured = bool(run.iters) and (device.is_cpu or run.offload_device != "none")
        if captured:
            parts.append(Quantity("captured outputs", states))
            parts.append(Quantity("inputs and outputs of the quantized chain", 2 * states))
        times = 2 if captured else 1
        parts.append(Quantity("attention masks, captured and in the cache", times * masks))
    if run.distillation_iters:
        recorded = run.distillation_samples * run.length * run.distillation_positions
        parts.append(Quantity("predictions of the original", recorded * TEACHER_BYTES))
    if counts.chosen:
        measured = min(run.samples, run.choosing_samples) * run.length * counts.hidden * itemsize
        parts.append(Quantity("inputs of all blocks, to choose bits", counts.num_blocks * measured))
    if device.is_cpu:
        parts += on_device.parts
    return [part for part in parts if part.value]
