"""Three bits per weight in the mean: each layer gets 2, 4 or 8, by what it loses.

python examples/auto_scheme.py --output output/auto_scheme
"""

from smollm2 import answer, load, parse_arguments

from autoround_modifier import AutoRoundModifier, AutoSchemeModifier, oneshot, self_generated

arguments = parse_arguments(__doc__)
tiny = arguments.tiny

# 1. Load
model, tokenizer = load(arguments.model)

# 2. Calibrate
samples, length = (4, 16) if tiny else (128, 256)
dataset = self_generated(model, tokenizer, num_samples=samples, max_seq_length=length)

# 3. Recipe
chooser = AutoSchemeModifier(
    avg_bits=3.0,
    options=["W2A16G64", "W4A16G64", "W8A16G64"],
    cache_dir=not tiny,  # scores are kept, so that another budget costs no time
)
settings = {"iters": 2} if tiny else {"preset": "light"}
tuner = AutoRoundModifier(**settings)

# 4. Quantize
model = oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=[chooser, tuner])
print(chooser.choice.table())

# 5. Generate
print(answer(model, tokenizer, "What is gravity?"))

# 6. Save
model.save_pretrained(arguments.output, save_compressed=True)
tokenizer.save_pretrained(arguments.output)
