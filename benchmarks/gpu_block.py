"""
Cost of tuning one decoder block on an accelerator, beside the block's bare forward and backward.

    make gpu-check

The block has the shape of Llama 3.1 8B and random weights in bfloat16. What it sees is recorded as
in a run, in eager attention, and kept on the device or on the host; it is searched and tuned by the
classes that a run uses. The floor is measured in the same process, before and after: forward and
backward in causal SDPA with trainable weights, on a batch that is on the device. Compilation and
warm-up are not counted. Launches, copies and waits are those of one step, by the profiler.

    python benchmarks/gpu_block.py --device cpu --hidden 128 --intermediate 256 --heads 4 \
        --kv-heads 2 --samples 8 --length 16 --batch 4 --steps 3 --warmup 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerator import Device
from block_table import Row, markdown
from compressed_tensors.quantization import QuantizationArgs
from device_counts import DeviceProfile
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autoround_modifier.blocks.experts import ExpertRouting
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.blocks.placement import SamplePlacement
from autoround_modifier.blocks.store import BlockSamples, CalibrationStore
from autoround_modifier.device import Compute
from autoround_modifier.host.attention import sdpa_computes_the_same, tuning_attention
from autoround_modifier.host.schemes import weight_spec
from autoround_modifier.modifiers.recorder import CalibrationRecorder
from autoround_modifier.search.initial_weights import InitialWeights
from autoround_modifier.tuning import Tuner, TuningConfig

FEW_SAMPLES = 32  # where the host's memory does not hold all
PROFILED_STEPS = 2
FORMATS = {
    "w4": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 128},
    "w2": {"num_bits": 2, "symmetric": True, "strategy": "group", "group_size": 64},
}


def one_block_llama(shape: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(shape.length, 64),
        attn_implementation="eager",  # as LLM-Compressor calibrates
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def record(
    model: LlamaForCausalLM, block: nn.Module, shape: argparse.Namespace, store_on: str
) -> tuple[BlockSamples, Importance]:
    """
    :param store_on: ``device`` or ``host``
    :return: what the block sees and gives, as a run records it; importance of input channels
    """
    placement = SamplePlacement("none" if store_on == "device" else "cpu")
    store = CalibrationStore({block: "model.layers.0"}, shape.samples, placement)
    importance = Importance()
    recorder = CalibrationRecorder(
        [block], lambda block: None, ExpertRouting(model), importance, store
    )
    handles = []

    def register(module: nn.Module, hook: Callable, kind: str, **options: Any) -> None:
        register_hook = getattr(module, f"register_{kind}_hook")  # forward or forward_pre
        handles.append(register_hook(hook, **options))

    recorder.install(register, [x for x in block.modules() if isinstance(x, nn.Linear)], [])
    device, dtype = model.device, model.dtype
    for _ in range(shape.samples):
        hidden = torch.randn(1, shape.length, shape.hidden, device=device, dtype=dtype)
        mask = torch.ones(1, shape.length, device=device, dtype=torch.long)
        model.model(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    samples = store.pop(block)
    assert samples is not None
    return samples, importance


def floor_ms(
    device: Device, group: BlockGroup, samples: BlockSamples, shape: argparse.Namespace, mask: bool
) -> float:
    """
    :param mask: with the recorded attention mask; without one attention is causal
    :return: milliseconds of one forward and backward of the block with trainable weights
    """
    (block,) = group.blocks
    ((batch, hidden),) = group.microbatches(samples.inputs, list(range(shape.batch)))
    args, kwargs = samples.calls[0].stack([samples.calls[i] for i in batch], hidden)
    if not mask:
        kwargs["attention_mask"] = None

    def step() -> None:
        output = block(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().mean().backward()
        block.zero_grad(set_to_none=True)

    with torch.enable_grad():
        for _ in range(shape.warmup):
            step()
        seconds = device.seconds(lambda: [step() for _ in range(shape.steps)])
    return 1e3 * seconds / shape.steps


def searched(block: nn.Module, args: QuantizationArgs, importance: Importance, compute: Compute):
    """:return: the layers of the block as tuning starts from them"""
    names = {layer: name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    specs = dict.fromkeys(names, weight_spec(args))
    initial = InitialWeights(names, specs, importance.copy(), compute)
    initial.find_shared_scales(block, names, search=True)
    return {layer: initial.start(layer, search=True) for layer in names}


def tuned(
    group: BlockGroup,
    formats: dict[nn.Linear, Any],
    samples: BlockSamples,
    shape: argparse.Namespace,
    iters: int,
    marks: dict[int, Callable[[], None]],
) -> None:
    """:param marks: what is called after which step"""
    config = TuningConfig(
        iters=iters, batch_size=shape.batch, loss="balanced", holdout_evaluations=1
    )
    tuner = Tuner(group, formats, list(samples.inputs), samples.outputs, samples.masks, config)
    done = 0

    def on_iteration() -> None:
        nonlocal done
        done += 1
        marks.get(done, lambda: None)()

    failure = tuner.run(on_iteration).failure
    if failure is not None:
        raise RuntimeError(f"{failure} has NaN or infinity")


def measure(
    name: str,
    store_on: str,
    device: Device,
    model: LlamaForCausalLM,
    samples: BlockSamples,
    importance: Importance,
    shape: argparse.Namespace,
) -> Row:
    block = model.model.layers[0]
    group = BlockGroup([block], [samples.calls])
    args = QuantizationArgs(type="int", **FORMATS[name])
    compute = Compute(compiled=not shape.no_compile)
    with tuning_attention(model, sdpa_computes_the_same(model)):
        group.leave_out_causal_masks(samples.inputs)
        floors = [floor_ms(device, group, samples, shape, mask) for mask in (False, True)]
        say(f"{name}: floor {floors[0]:.1f} ms, with the recorded mask {floors[1]:.1f} ms")
        with torch.no_grad():
            first, again = (
                device.seconds(lambda: searched(block, args, importance, compute)) for _ in range(2)
            )
            say(f"{name}: search {again:.2f} s, the first time {first:.1f} s")
            formats = searched(block, args, importance, compute)
        held = device.peak_reset()
        times: list[float] = []
        marks = dict.fromkeys(
            (shape.warmup, shape.warmup + shape.steps), lambda: times.append(device.now())
        )
        tuned(group, formats, samples, shape, shape.warmup + shape.steps, marks)
        peak = device.peak()
        step_ms = 1e3 * (times[1] - times[0]) / shape.steps
        say(f"{name}: {step_ms:.1f} ms in each step")
        profile, found = DeviceProfile(device.device), []

        def begin() -> None:
            device.now()
            profile.start()

        def end() -> None:
            device.now()
            found.append(profile.stop(PROFILED_STEPS))

        last = 1 + PROFILED_STEPS
        tuned(group, formats, samples, shape, last, {1: begin, last: end})
        floors_after = [floor_ms(device, group, samples, shape, mask) for mask in (False, True)]
    plain, masked = (statistics.mean(pair) for pair in zip(floors, floors_after, strict=True))
    gib = None if peak is None else (peak - held) / 2**30
    return Row(
        name, store_on, step_ms, plain, masked, again, first, gib, compute.compiled, found[0]
    )


def say(message: str) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {message}", flush=True)


def fit_host_memory(shape: argparse.Namespace) -> None:
    """Fewer samples where inputs and outputs of all would take half of the memory that is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = shape.samples * shape.length * shape.hidden * torch.bfloat16.itemsize * 2
    if needed > free / 2 and shape.samples > FEW_SAMPLES:
        say(f"{free / 1e9:.1f} GB are free: {FEW_SAMPLES} samples, not {shape.samples}")
        shape.samples = FEW_SAMPLES


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the measured ones")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument(
        "--store",
        nargs="+",
        default=["device", "host"],
        choices=["device", "host"],
        help="where recorded samples are kept: AutoRoundModifier keeps those of all blocks but the "
        "first on the device, where they fit",
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", help="default: the accelerator, or else the CPU")
    parser.add_argument("--output", type=Path, default=Path("output/gpu/gpu_block.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    shape = parsed(arguments)
    device = Device(shape.device)
    say(f"{device.description()}, PyTorch {torch.__version__}")
    fit_host_memory(shape)
    model = one_block_llama(shape, device.device)
    facts = {
        "device": device.description(),
        "torch": torch.__version__,
        **{key: value for key, value in vars(shape).items() if isinstance(value, (int, bool))},
    }
    rows: list[Row] = []
    shape.output.parent.mkdir(parents=True, exist_ok=True)
    for store_on in shape.store:
        samples, importance = record(model, model.model.layers[0], shape, store_on)
        say(f"{shape.samples} samples of {shape.length} tokens are recorded, on the {store_on}")
        for name in shape.formats:
            rows.append(measure(name, store_on, device, model, samples, importance, shape))
            result = facts | {"rows": [asdict(row) for row in rows]}
            shape.output.write_text(json.dumps(result, indent=1))
            shape.output.with_suffix(".md").write_text(markdown(facts, rows))
        del samples
    print(markdown(facts, rows), flush=True)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
