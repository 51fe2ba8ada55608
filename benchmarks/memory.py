"""
Peak memory of tuning beyond what the process held with the model loaded, over the number of blocks.

    make bench-memory

Stacks of Llama blocks in the shape of SmolLM2-135M with random weights (bfloat16) are tuned at 2
bits, each in a process of its own: with the model in memory, and with the model left on the disk,
as `compressed_tensors.offload.load_offloaded_model` loads it. A process first quantizes a tiny
model, so that everything is imported; then its peak (``VmHWM``) is reset, the stack is loaded, and
what counts is the peak from there on, less what was resident before quantizing began. Scales and
zero points stay with the model, and are named as well. Nothing is compiled unless ``--compile``
says so: a compiler needs more memory than all that is measured here.

With ``--distillation-iters`` scales are trained as well, those of a model on the disk as where
memory does not hold it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from child import current_rss, report, run_child
from compressed_tensors.offload import disable_onloading, load_offloaded_model
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from speed import VOCABULARY, WEIGHTS
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from autoround_modifier import AutoRoundModifier, ScaleDistillationModifier, oneshot
from autoround_modifier.distillation import residency
from autoround_modifier.runs.files import write_atomically

BLOCKS = [10, 20, 40, 80]
LABELS = {"memory": "in memory", "disk": "on the disk"}
PLACES = list(LABELS)
COMPARED = "weights of the blocks, for comparison"
WIDTH = 576
MIB = 2**20


def save_stack(folder: Path, num_blocks: int, width: int = WIDTH) -> None:
    """Write a Llama of blocks in the proportions of SmolLM2-135M, which has width 576."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=num_blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load(folder: Path, place: str, offload_folder: Path) -> PreTrainedModel:
    """
    :param place: ``memory``, or ``disk`` for no weight in memory but those of the running block
    :param offload_folder: where weights that changed are written
    """
    if place == "disk":
        with load_offloaded_model():
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                device_map="auto_offload",
                max_memory={"cpu": 0},
                offload_folder=offload_folder,
            )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # resident, not mapped to the file
    return model


def tune(
    model: PreTrainedModel,
    samples: int,
    length: int,
    iters: int,
    distillation_iters: int = 0,
    **fields: Any,
) -> None:
    """
    Quantize all blocks.

    :param distillation_iters: steps that train scales; 0 for none
    :param fields: of `AutoRoundModifier`
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    ids = torch.randint(1, VOCABULARY, (samples, length))
    recipe = AutoRoundModifier(
        iters=iters,
        batch_size=4,
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        **{"enable_torch_compile": False, **fields},
    )
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    modifiers: list[Modifier] = [recipe]
    if distillation_iters:
        modifiers.append(ScaleDistillationModifier(iters=distillation_iters))
    oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=modifiers)


def run(place: str, num_blocks: int, folder: str, arguments: argparse.Namespace) -> dict:
    """Tune one stack; the only work of a child process."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save_stack(scratch / "tiny", 2, width=192)
        tune(load(scratch / "tiny", place, scratch / "first"), 4, 16, 1)
        settle()
        imported = current_rss()
        model = load(Path(folder), place, scratch / "offloaded")
        settle()
        held = current_rss()
        size = parameter_bytes(model)
        reset_peak()
        started = time.perf_counter()
        sizes = arguments.samples, arguments.length, arguments.iters, arguments.distillation_iters
        if place == "disk":
            residency.SHARE = 0.0  # of the free memory, for weights
        tune(model, *sizes, enable_torch_compile=arguments.compile)
        peak = peak_rss()
        return {
            "place": place,
            "blocks": num_blocks,
            "weights": weights_bytes(num_blocks, arguments.width),
            "model": held - imported,
            "beyond": peak - held,
            "added": parameter_bytes(model) - size,
            "seconds": time.perf_counter() - started,
        }


def parameter_bytes(model: PreTrainedModel) -> int:
    """:return: bytes of all parameters, wherever they are"""
    with disable_onloading():
        return sum(parameter.nbytes for parameter in model.parameters())


def settle() -> None:
    """Give back to the system what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Let the peak of this process's resident size begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """:return: largest resident size since `reset_peak`, bytes (Linux)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def weights_bytes(num_blocks: int, width: int) -> int:
    """:return: bytes of the linear layers of all blocks in bfloat16"""
    attention = width * (2 * width + 2 * 64 * max(1, width // 192))
    return 2 * num_blocks * (attention + 3 * width * (width * 8 // 3))


def markdown(rows: list[dict]) -> str:
    lines = [
        "| model | blocks | weights of the blocks, MiB | resident with the model loaded, MiB "
        "| peak beyond that, MiB | of it scales and zero points, MiB |",
        "| --- " * 6 + "|",
    ]
    for place in PLACES:
        for row in (row for row in rows if row["place"] == place):
            added = row["added"] if place == "memory" else 0
            lines.append(
                f"| {LABELS[place]} | {row['blocks']} | {row['weights'] / MIB:.0f} "
                f"| {row['model'] / MIB:.0f} | {row['beyond'] / MIB:.0f} | {added / MIB:.1f} |"
            )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """
    :param path: where to save; its ending says how (``.png``, ``.svg``, ``.pdf``)
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for place in PLACES:
        own = [row for row in rows if row["place"] == place]
        axes.plot(
            [row["blocks"] for row in own],
            [row["beyond"] / MIB for row in own],
            "o-",
            label=f"peak beyond the model, model {LABELS[place]}",
        )
    weights = {row["blocks"]: row["weights"] / MIB for row in rows}
    axes.plot(*zip(*sorted(weights.items()), strict=True), "--", color="gray", label=COMPARED)
    axes.set_xticks(list(weights))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("blocks")
    axes.set_ylabel("MiB")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--places", nargs="+", default=PLACES, choices=PLACES)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--distillation-iters", type=int, default=0, help="steps; 0 trains no scales"
    )
    parser.add_argument("--iters", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output/memory.json"))
    parser.add_argument("--plot", type=Path, help="where to save a picture")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        place, num_blocks, folder = arguments.run
        with contextlib.redirect_stdout(sys.stderr):
            result = run(place, int(num_blocks), folder, arguments)
        report(result)
        return

    rows: list[dict] = []
    for num_blocks in arguments.blocks:
        with tempfile.TemporaryDirectory() as folder:
            save_stack(Path(folder), num_blocks, arguments.width)
            for place in arguments.places:
                run_arguments = ["--run", place, str(num_blocks), folder]
                rows.append(run_child(__file__, *sys.argv[1:], *run_arguments))
        write_atomically(arguments.output, json.dumps(rows, indent=1))
        write_atomically(arguments.output.with_suffix(".md"), markdown(rows) + "\n")
    print(markdown(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
