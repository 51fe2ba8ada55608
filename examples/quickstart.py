"""Quantize SmolLM2-135M to 4 bits and to 2 bits, save and reload both, compare with the original.

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
question = "What is the capital of France?"


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


# 1. Load
original, tokenizer = load(arguments.model)

# 2. Calibration text: the model writes it itself, so nothing is downloaded
samples, length = (12, 16) if tiny else (96, 128)
text = self_generated(original, tokenizer, samples, length, batch_size=samples)
held_out = samples // 3  # calibration never sees these samples
evaluation = torch.tensor(text.select(range(held_out))["input_ids"])
dataset = text.select(range(held_out, samples))

settings = {"iters": 2} if tiny else {"iters": 50, "batch_size": 2}
folders = {"4 bits": arguments.output, "2 bits": arguments.output / "w2"}
recipes = {"4 bits": "w4a16_autoround", "2 bits": "w2a16_autoround"}
answers = {"original": answer(original, tokenizer, question)}
rows = [f"{'original':<10}{megabytes(arguments.model):>5.0f} MB"]
for name, folder in folders.items():
    # 3. Quantize
    print(f"\nQuantizing to {name} with {recipes[name]}", flush=True)
    model, _ = load(arguments.model)
    recipe = load_recipe(recipes[name], **settings)
    model = oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)

    # 4. Save, and load again as any user of the checkpoint would
    model.save_pretrained(folder, save_compressed=True)
    tokenizer.save_pretrained(folder)
    quantized, _ = load(folder)

    # 5. Compare
    answers[name] = answer(quantized, tokenizer, question)
    result = compare(original, quantized, evaluation)
    rows[0] = f"{rows[0][:18]}{'':>15}{'':>17}{result.reference_perplexity:>12.1f}"
    rows.append(
        f"{name:<10}{megabytes(folder):>5.0f} MB{result.kl:>15.3f}{result.top1:>17.1%}"
        f"{result.perplexity:>12.1f}"
    )

print(f"\n{'question':<10}{question}")
for name, text in answers.items():
    print(f"{name:<10}{text!r}")
print(f"\n{'':<10}{'size':>8}{'KL divergence':>15}{'top-1 agreement':>17}{'perplexity':>12}")
print(*rows, sep="\n")
print(f"\nsaved in {folders['4 bits']} (4 bits) and {folders['2 bits']} (2 bits)")
print(f"{time.perf_counter() - started:.0f} seconds")
