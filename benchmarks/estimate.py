"""
The tables of docs/benchmarks/memory.md: what four released models take on one GPU of 80 GB.

    python benchmarks/estimate.py

Made by `autoround_modifier.planning`, as `autoround-modifier plan` makes them for any model. The
last two tables hold its formulas beside what was measured: memory of blocks on a CPU, and a step of
one block on an H200.
"""

from __future__ import annotations

from collections.abc import Callable

from released_configs import (
    DEEPSEEK_R1,
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    QWEN3_30B_A3B,
    configuration,
)
from transformers import LlamaConfig

from autoround_modifier.planning import Plan, find_machine, plan
from autoround_modifier.planning.duration import step_seconds
from autoround_modifier.planning.hardware import DEVICES, Device
from autoround_modifier.planning.quantities import total

MODELS = {
    "Llama-3.1-8B, W2 g64": (LLAMA_3_1_8B, "w2a16_autoround"),
    "Llama-3.1-70B, W2 g64": (LLAMA_3_1_70B, "w2a16_autoround"),
    "Qwen3-30B-A3B, W4 g64": (QWEN3_30B_A3B, "w4a16_autoround"),
    "DeepSeek-R1, `deepseek_r1_int2_mixed`": (DEEPSEEK_R1, "deepseek_r1_int2_mixed"),
}
ROWS: dict[str, Callable[[Plan], float]] = {
    "weights of the largest block, billions": lambda x: max(
        (b.dense + b.experts) / 1e9 for b in x.counts.blocks
    ),
    "device memory at the peak, GB": lambda x: x.peak.size / 1e9,
    "host memory at the peak, GB": lambda x: total(x.host) / 1e9,
    "of it the model, GB (none if on the disk)": lambda x: x.counts.size / 1e9,
    "disk, GB": lambda x: total(x.disk) / 1e9,
    "of it the checkpoint, GB": lambda x: x.checkpoint.value / 1e9,
    "hours": lambda x: total(x.seconds) / 3600,
}
# Measured by `benchmarks/memory.py --places memory --iters 2`, batches of 4, not compiled: blocks,
# width, samples, tokens, MiB beyond the model
MEASURED_ON_CPU = [(4, 576, 64, 512, 417), (4, 576, 256, 256, 451), (4, 1536, 64, 256, 585)]
# docs/benchmarks/gpu.md: scheme, ms for each step, peak GiB
MEASURED_ON_H200 = [("W4A16_ASYM", 81.8, 5.22), ("W2A16G64", 88.7, 5.23)]
MIB = 2**20


def markdown() -> str:
    machine = find_machine("h100", "2TB", "4TB")
    plans = [plan(configuration(c), recipe, machine=machine) for c, recipe in MODELS.values()]
    small = [
        plan(configuration(c), recipe, machine=machine, batch_size=2)
        for c, recipe in MODELS.values()
    ]
    lines = [f"| on {machine.device.name} | {' | '.join(MODELS)} |", "| --- " * 5 + "|"]
    for name, value in ROWS.items():
        lines.append(f"| {name} | {' | '.join(_number(value(x)) for x in plans)} |")
        if name.startswith("device"):
            of_small = " | ".join(_number(value(x)) for x in small)
            lines.append(f"| the same, batches of 2 | {of_small} |")
    return "\n".join([*lines, "", *on_cpu(), "", *on_h200()])


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def on_cpu() -> list[str]:
    """:return: memory of tuning beyond the model and the process, beside what was measured"""
    lines = [
        "| on a CPU: blocks | width | samples | tokens | planned, MiB | measured, MiB |",
        "| --- " * 6 + "|",
    ]
    machine = find_machine("cpu", "1TB", "1TB")
    for blocks, width, samples, length, measured in MEASURED_ON_CPU:
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 192),
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        found = plan(
            config,
            "w2a16_autoround",
            machine=machine,
            max_seq_length=length,
            batch_size=4,
            num_calibration_samples=samples,
        )
        planned = sum(part.value for part in found.host[2:]) / MIB
        lines.append(f"| {blocks} | {width} | {samples} | {length} | {planned:.0f} | {measured} |")
    return lines


def on_h200() -> list[str]:
    """:return: a step and the peak of a block of Llama-3.1-8B, beside what was measured"""
    lines = [
        "| a block of Llama-3.1-8B on an H200 | planned, ms for each step | measured "
        "| planned peak, GiB, without CUDA | measured |",
        "| --- " * 5 + "|",
    ]
    device: Device = DEVICES["h200"]
    machine = find_machine("h200", "1TB", "1TB")
    one_block = configuration({**LLAMA_3_1_8B, "num_hidden_layers": 1})
    for scheme, milliseconds, gib in MEASURED_ON_H200:
        found = plan(one_block, scheme=scheme, machine=machine, offload_device="cpu")
        (block,) = found.counts.blocks
        step = step_seconds(block, found.run, device, found.counts.hidden, 2)
        peak = sum(part.value for part in found.peak.parts[:-1]) / 2**30
        lines.append(
            f"| {scheme} | {1e3 * sum(step.values()):.1f} | {milliseconds} | {peak:.2f} | {gib} |"
        )
    return lines


if __name__ == "__main__":
    print(markdown())
