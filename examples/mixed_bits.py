"""Attention of 4 bits and MLP of 2 bits, with groups written in Python.

python examples/mixed_bits.py --output output/mixed_bits
"""

from smollm2 import answer, load, parse_arguments

from autoround_modifier import AutoRoundModifier, oneshot, self_generated

arguments = parse_arguments(__doc__)
tiny = arguments.tiny

# 1. Load
model, tokenizer = load(arguments.model)

# 2. Calibrate
samples, length = (4, 16) if tiny else (128, 256)
dataset = self_generated(model, tokenizer, num_samples=samples, max_seq_length=length)

# 3. Recipe
settings = {"iters": 2} if tiny else {"preset": "light"}
attention = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}
mlp = {"num_bits": 2, "symmetric": False, "strategy": "group", "group_size": 64}
recipe = AutoRoundModifier(
    config_groups={
        "attention": {"targets": [r"re:.*self_attn\..*_proj$"], "weights": attention},
        "mlp": {"targets": [r"re:.*mlp\..*_proj$"], "weights": mlp},
    },
    **settings,
)

# 4. Quantize
model = oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)

# 5. Generate
print(answer(model, tokenizer, "What is gravity?"))

# 6. Save
model.save_pretrained(arguments.output, save_compressed=True)
tokenizer.save_pretrained(arguments.output)
