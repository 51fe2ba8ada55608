"""
Accuracy of each preset and scheme on a model, on text that calibration never saw.

    make bench-accuracy TEXT=path/to/text.jsonl

``TEXT`` is a JSON-lines file with a field ``text``; lines with ``"split": "calib"`` calibrate and
lines with ``"split": "eval"`` evaluate. Each row runs in a process of its own, so that its peak
memory is its own. Results are written as JSON, and printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoround_modifier import AutoRoundModifier, oneshot, self_generated, text_dataset
from autoround_modifier.evaluation import compare

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2 import save_smollm2

# scheme -> bits, symmetric
SCHEMES = {
    f"w{bits}{'' if symmetric else '-asym'}": (bits, symmetric)
    for bits in range(2, 9)
    for symmetric in (True, False)
}


def run_row(arguments: argparse.Namespace) -> dict:
    """Quantize once and measure; the only work of a child process."""
    scheme, settings, calibration = arguments.row.split(",")
    preset, *overrides = settings.split("+")
    fields = {name: yaml.safe_load(value) for name, value in (x.split("=") for x in overrides)}
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    sizes = {"num_samples": arguments.samples, "max_seq_length": arguments.length}
    if preset == "rtn":
        dataset = None
    elif calibration == "self":
        dataset = self_generated(original, tokenizer, **sizes)
    else:
        dataset = text_dataset(arguments.text, tokenizer, **sizes, split="calib")
    held_out = text_dataset(arguments.text, tokenizer, 40, 256, split="eval")

    bits, symmetric = SCHEMES[scheme]
    weights = {
        "num_bits": bits,
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    recipe = AutoRoundModifier(
        preset=preset,
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        **{"batch_size": arguments.batch_size, "seed": arguments.seed, **fields},
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    started = time.perf_counter()
    oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
    result = compare(original, model, torch.tensor(held_out["input_ids"]))
    return {
        "scheme": scheme,
        "settings": settings,
        "calibration": "none" if preset == "rtn" else calibration,
        "seed": arguments.seed,
        "kl": result.kl,
        "top1": result.top1,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "seconds": seconds,
        "peak_mib": peak,
    }


def markdown(results: list[dict]) -> str:
    lines = [
        "| scheme | settings | calibration | KL | top-1 | perplexity | seconds | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['scheme']} | {row['settings']} | {row['calibration']} | {row['kl']:.3f} | "
        f"{row['top1']:.1%} | {row['perplexity']:.1f} | {row['seconds']:.0f} | "
        f"{row['peak_mib']:.0f} |"
        for row in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint; defaults to the packaged SmolLM2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[
            "w2,rtn,text",
            "w2,opt_rtn,text",
            "w2,light,text",
            "w2,default+iters=50,text",
            "w2,default+iters=50,self",
            "w2-asym,default+iters=50,text",
            "w2-asym,default+iters=50+scale_search=true,text",
            "w4,rtn,text",
            "w4,light,text",
        ],
        help="scheme,preset[+field=value...],calibration; calibration is `text` or `self`",
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("output/accuracy.json"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = arguments.model or save_smollm2()
    if arguments.row:
        print("RESULT " + json.dumps(run_row(arguments)))
        return

    results = []
    for row in arguments.rows:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        results.append(json.loads(line.removeprefix("RESULT ")))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1))
        print(markdown(results[-1:]).splitlines()[-1], flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
