"""Quantize SmolLM2-135M to 2 bits, save it, load it again, and compare it with the original.

make quickstart
"""

import time
from pathlib import Path

import torch
from smollm2 import answer, load, parse_arguments

from autoround_modifier import load_recipe, oneshot, self_generated
from autoround_modifier.evaluation import compare

arguments = parse_arguments(__doc__)
tiny = arguments.tiny
started = time.perf_counter()


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


# 1. Load
model, tokenizer = load(arguments.model)
original, _ = load(arguments.model)

# 2. Calibrate: on text that the model writes itself, so no download is needed
samples, length = (12, 16) if tiny else (96, 256)
text = self_generated(model, tokenizer, samples, length, batch_size=samples)
held_out = samples // 3  # calibration never sees these samples
evaluation = torch.tensor(text.select(range(held_out))["input_ids"])
dataset = text.select(range(held_out, samples))

# 3. Recipe
settings = {"iters": 2} if tiny else {"iters": 50, "batch_size": 4}
recipe = load_recipe("w2a16_autoround", **settings)

# 4. Quantize
model = oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)

# 5. Save, and load again as any user of the checkpoint would
model.save_pretrained(arguments.output, save_compressed=True)
tokenizer.save_pretrained(arguments.output)
quantized, _ = load(arguments.output)

# 6. Compare
question = "What is gravity?"
result = compare(original, quantized, evaluation)
print(f"\nquestion   {question}")
print(f"original   {answer(original, tokenizer, question)!r}")
print(f"quantized  {answer(quantized, tokenizer, question)!r}")
print(f"size       {megabytes(arguments.model):.0f} MB -> {megabytes(arguments.output):.0f} MB")
print(
    f"held out   KL divergence {result.kl:.3f}, top-1 agreement {result.top1:.1%}, "
    f"perplexity {result.reference_perplexity:.2f} -> {result.perplexity:.2f}"
)
print(f"saved      {arguments.output}")
print(f"time       {time.perf_counter() - started:.0f} s")
