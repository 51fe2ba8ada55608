"""Weights of 2 bits with zero points: the most accurate 2-bit integers.

python examples/asymmetric.py --output output/asymmetric
"""

from smollm2 import answer, load, parse_arguments

from autoround_modifier import load_recipe, oneshot, self_generated

arguments = parse_arguments(__doc__)
tiny = arguments.tiny

# 1. Load
model, tokenizer = load(arguments.model)

# 2. Calibrate
samples, length = (4, 16) if tiny else (128, 256)
dataset = self_generated(model, tokenizer, num_samples=samples, max_seq_length=length)

# 3. Recipe
settings = {"iters": 2} if tiny else {"preset": "light"}
recipe = load_recipe("w2a16_asym_autoround", **settings)

# 4. Quantize
model = oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)

# 5. Generate
print(answer(model, tokenizer, "What is gravity?"))

# 6. Save
model.save_pretrained(arguments.output, save_compressed=True)
tokenizer.save_pretrained(arguments.output)
