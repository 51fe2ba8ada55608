"""Calibration text of your own: a text file, or JSON lines with a field ``text``.

python examples/own_dataset.py --output output/own_dataset
"""

from pathlib import Path

from smollm2 import answer, load, parse_arguments

from autoround_modifier import load_recipe, oneshot, text_dataset

arguments = parse_arguments(__doc__)
tiny = arguments.tiny

# 1. Load
model, tokenizer = load(arguments.model)

# 2. Calibrate
text = Path(__file__).parent.parent / "README.md"  # put your own file here
samples, length = (4, 16) if tiny else (128, 64)
dataset = text_dataset(text, tokenizer, num_samples=samples, max_seq_length=length)

# 3. Recipe
settings = {"iters": 2} if tiny else {"preset": "light"}
recipe = load_recipe("w3a16_autoround", **settings)

# 4. Quantize
model = oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)

# 5. Generate
print(answer(model, tokenizer, "What is gravity?"))

# 6. Save
model.save_pretrained(arguments.output, save_compressed=True)
tokenizer.save_pretrained(arguments.output)
