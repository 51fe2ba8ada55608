"""
Real models on real text, from a folder to a checkpoint that is loaded again:

    python benchmarks/end_to_end.py --text wiki.jsonl --output end_to_end.md MODEL_FOLDER...

Each model is quantized to four bits by its path, saved, checked, and loaded again; the loaded
one must give the logits of the one in memory. It is then compared with its original on text
that calibration never saw. ``TEXT`` is as in `accuracy.py`.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from autoround_modifier import check_checkpoint, evaluate, quantize, text_dataset

LENGTH = 128
NUM_SAMPLES = 32
PROMPT = "The capital of France is"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
HEADER = (
    "| model | problems found | reload: largest difference of logits | KL | top-1 | perplexity "
    "(original) | seconds | peak GB | continues as |"
)


def row(folder: Path, text: Path) -> str:
    """:return: what became of one model"""
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as output:
        model = quantize(
            str(folder),
            {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
            text_dataset(text, tokenizer, NUM_SAMPLES, LENGTH, split="calib"),
            preset="light",
            iters=20,
            output_dir=output,
        )
        seconds = time.perf_counter() - started
        unseen = torch.tensor(
            text_dataset(text, tokenizer, NUM_SAMPLES, LENGTH, split="eval")["input_ids"]
        )
        problems = len(check_checkpoint(output))
        expected = logits(model, unseen)
        del model
        loaded = AutoModelForCausalLM.from_pretrained(output)
        difference = float((logits(loaded, unseen) - expected).abs().max())
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        found = evaluate(original, loaded, unseen)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        ids = loaded.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    words = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    continued = " ".join(words.split()).replace("|", "/")
    return (
        f"| {folder.name} | {problems} | {difference:g} | {found.kl:.4f} | {found.top1:.1%} | "
        f"{found.perplexity:.2f} ({found.reference_perplexity:.2f}) | {seconds:.0f} | {peak:.1f} | "
        f"{continued} |"
    )


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return torch.cat([model(input_ids=one[None]).logits[:, -1] for one in ids]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="folders")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="Markdown file")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [HEADER, "| --- |" + " --- |" * (HEADER.count("|") - 2)]
    for folder in arguments.models:
        lines.append(row(folder, arguments.text))
        print(lines[-1], flush=True)
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
