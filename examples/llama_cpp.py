"""Weights of 2 bits for llama.cpp: a GGUF file with the integers and scales that were tuned.

git clone https://github.com/ggml-org/llama.cpp; pip install 'autoround-modifier[gguf]'
LLAMA_CPP_ROOT=llama.cpp python examples/llama_cpp.py --output output/llama_cpp
"""

from pathlib import Path

from smollm2 import load, parse_arguments

from autoround_modifier import export, load_recipe, oneshot, self_generated

arguments = parse_arguments(__doc__)
tiny = arguments.tiny

# 1. Load
model, tokenizer = load(arguments.model)

# 2. Calibrate
samples, length = (4, 16) if tiny else (128, 256)
dataset = self_generated(model, tokenizer, num_samples=samples, max_seq_length=length)

# 3. Recipe: symmetric integers in groups of 64, which are llama.cpp's type Q2_0
settings = {"iters": 2} if tiny else {"preset": "light"}
recipe = load_recipe("w2a16_autoround", **settings)

# 4. Quantize and save
model = oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)
model.save_pretrained(arguments.output, save_compressed=True)
tokenizer.save_pretrained(arguments.output)

# 5. Export; the embeddings, which are the head as well, are rounded to 8 bits
file = Path(arguments.output).with_suffix(".gguf")
exported = export(arguments.output, "gguf:q2_0", file, embeddings="q8_0", overwrite=True)
print(f"{file}: {exported.layers} layers, {exported.bytes / 1e6:.0f} MB")
print(f"llama-cli -m {file}")
