"""Quantize SmolLM2-135M to 4 bits and to 2 bits, save and reload both, compare with the original.

make quickstart
"""

import time
from pathlib import Path

import torch
from smollm2 import answer, load, parse_arguments

from autoround_modifier import evaluate, load_recipe, oneshot, self_generated

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

answers = {"original": answer(original, tokenizer, question)}
sizes = {"original": megabytes(arguments.model)}
results = {}
settings = {"iters": 2} if tiny else {"iters": 50, "batch_size": 2}
runs = {
    "4 bits": ("w4a16_autoround", arguments.output),
    "2 bits": ("w2a16_autoround", arguments.output / "w2"),
}
for name, (recipe, folder) in runs.items():
    # 3. Quantize
    print(f"\nQuantizing to {name} with the recipe {recipe}", flush=True)
    model, _ = load(arguments.model)
    model = oneshot(
        model=model, tokenizer=tokenizer, dataset=dataset, recipe=load_recipe(recipe, **settings)
    )

    # 4. Save, and load again as any user of the checkpoint would
    model.save_pretrained(folder, save_compressed=True)
    tokenizer.save_pretrained(folder)
    quantized, _ = load(folder)

    # 5. Compare
    answers[name] = answer(quantized, tokenizer, question)
    sizes[name] = megabytes(folder)
    results[name] = evaluate(original, quantized, evaluation)

print(f"\n{question}")
for name, text in answers.items():
    print(f"{name:<10}{' '.join(text.split()) or '(no answer)'}")
print(f"\n{'':<10}{'size':>8}{'KL divergence':>15}{'same top token':>16}{'perplexity':>12}")
perplexity = results["4 bits"].reference_perplexity
print(f"{'original':<10}{sizes['original']:>5.0f} MB{'':>31}{perplexity:>12.1f}")
for name, result in results.items():
    row = f"{result.kl:>15.3f}{result.top1:>16.1%}{result.perplexity:>12.1f}"
    print(f"{name:<10}{sizes[name]:>5.0f} MB{row}")
saved = ", ".join(f"{name} in {folder}" for name, (_, folder) in runs.items())
print(f"\nsaved {saved}; {time.perf_counter() - started:.0f} seconds in all")
