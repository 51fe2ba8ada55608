"""
Cost of tuning one decoder block: seconds per iteration, set-up and peak memory, of this package,
of auto-round, and of the bare block's forward and backward, which is the floor.

    make bench-speed

A Llama with one block of random weights is quantized by each method with two numbers of iterations;
the difference is the time of an iteration, and what is left is the set-up. Machines are noisy: the
methods take turns, several rounds of them, and the fastest run of each counts. Each run has a
process of its own; its memory is the peak resident size beyond what it held before it started to
quantize, with everything imported and the model loaded. Then one thing at a time is varied.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from child import current_rss, report, run_child
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
WEIGHTS = {
    "num_bits": 2,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 64,
}
METHODS = [
    "floor",
    "ours-v1",
    "ours-v1-eager",
    "ours",
    "auto-round-v1",
    "auto-round-v1-compile",
    "auto-round-alg_ext",
    "auto-round-alg_ext-compile",
]
BASE = {"width": 576, "samples": 64, "length": 256, "batch": 4}
# Varied one at a time, for the methods named first
VARIED_METHODS = ["floor", "ours", "auto-round-alg_ext"]
VARIED = [
    {"samples": 128},
    {"length": 512},
    {"width": 1536},
]


def one_block_llama(width: int) -> LlamaForCausalLM:
    """A block in the proportions of SmolLM2-135M at width 576."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    folder = tempfile.mkdtemp()  # LLM-Compressor looks for the files of the model it is given
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def run(method: str, iters: int, shape: dict[str, int]) -> dict[str, float]:
    """Quantize once; the only work of a child process."""
    model = one_block_llama(shape["width"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    ids = torch.randint(1, VOCABULARY, (shape["samples"], shape["length"]))
    if method == "floor":
        work = floor(model, iters, shape)
    elif method.startswith("ours"):
        work = ours(model, tokenizer, ids, method, iters, shape)
    else:
        work = peer(model, tokenizer, ids, method, iters, shape)
    held = current_rss()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": max(0, peak - held)}


def floor(model, iters, shape):
    """Forward and backward of the block with trainable weights, nothing else."""
    block, config = model.model.layers[0], model.config
    hidden = torch.randn(shape["batch"], shape["length"], config.hidden_size, dtype=torch.bfloat16)
    position_ids = torch.arange(shape["length"])[None]
    with torch.no_grad():
        rotary = model.model.rotary_emb(hidden, position_ids)

    def work():
        for _ in range(iters):
            output = block(hidden, position_embeddings=rotary, attention_mask=None)
            output = output[0] if isinstance(output, tuple) else output
            output.float().square().mean().backward()
            block.zero_grad(set_to_none=True)

    return work


def ours(model, tokenizer, ids, method, iters, shape):
    from autoround_modifier import AutoRoundModifier, oneshot

    plain = {"scale_search": False, "loss": "mse"} if "v1" in method else {}
    recipe = AutoRoundModifier(
        preset="default",
        iters=iters,
        batch_size=shape["batch"],
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        enable_torch_compile="eager" not in method,
        **plain,
    )
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    return lambda: oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)


def peer(model, tokenizer, ids, method, iters, shape):
    from peers import PEERS, Task  # not charged to our own rows

    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    task = Task(model, tokenizer, dataset, WEIGHTS, shape["batch"], seed=42)
    options = {
        "iters": iters,
        "enable_alg_ext": "alg_ext" in method,
        "enable_torch_compile": "compile" in method,
    }
    return lambda: PEERS["auto-round"](task, **options)


def measure(
    methods: list[str], shape: dict[str, int], iters: tuple[int, int], rounds: int
) -> list[dict]:
    """One row for each method; the slope over the number of iterations is the time of one."""
    runs: dict[tuple[str, int], list[dict]] = {}
    for method in methods:
        child(method, 2, shape)  # fills the compiler's cache, so that runs differ in nothing else
    for _ in range(rounds):
        for method in methods:
            for count in iters:
                runs.setdefault((method, count), []).append(child(method, count, shape))
    rows = []
    for method in methods:
        few, many = (min(run["seconds"] for run in runs[method, count]) for count in iters)
        per_iteration = (many - few) / (iters[1] - iters[0])
        rows.append(
            {
                "method": method,
                **shape,
                "seconds_per_iteration": per_iteration,
                "setup_seconds": few - iters[0] * per_iteration,
                "peak_mib": min(run["bytes"] for run in runs[method, iters[1]]) / 2**20,
                "runs": [run["seconds"] for run in runs[method, iters[1]]],
            }
        )
    return rows


def child(method: str, iters: int, shape: dict[str, int]) -> dict[str, float]:
    return run_child(__file__, "--run", json.dumps([method, iters, shape]))


def markdown(rows: list[dict]) -> str:
    lines = [
        "| method | width | samples | length | batch | ms per iteration | of the floor "
        "| set-up s | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    floors = {key(row): row["seconds_per_iteration"] for row in rows if row["method"] == "floor"}
    for row in rows:
        ratio = row["seconds_per_iteration"] / floors[key(row)] if key(row) in floors else None
        lines.append(
            f"| {row['method']} | {' | '.join(str(value) for value in key(row))} "
            f"| {row['seconds_per_iteration'] * 1e3:.1f} | {f'{ratio:.2f}' if ratio else ''} "
            f"| {row['setup_seconds']:.1f} | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def key(row: dict) -> tuple:
    return row["width"], row["samples"], row["length"], row["batch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--iters", nargs=2, type=int, default=[20, 80], metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fixed", action="store_true", help="do not vary the shape")
    parser.add_argument("--output", type=Path, default=Path("output/speed.json"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        with contextlib.redirect_stdout(sys.stderr):
            result = run(*json.loads(arguments.run))
        report(result)
        return

    wanted = [(arguments.methods, BASE)]
    if not arguments.fixed:
        wanted += [(VARIED_METHODS, BASE | change) for change in VARIED]
    rows: list[dict] = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for methods, shape in wanted:
        rows += measure(methods, shape, tuple(arguments.iters), arguments.rounds)
        arguments.output.write_text(json.dumps(rows, indent=1))
        arguments.output.with_suffix(".md").write_text(markdown(rows) + "\n")
        print(markdown(rows), flush=True)


if __name__ == "__main__":
    main()
