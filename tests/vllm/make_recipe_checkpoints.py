"""One compressed checkpoint for each shipped recipe, of a tiny random Llama, rounded to nearest.

What vLLM's loader makes of them depends on names, shapes and dtypes only.

    python make_recipe_checkpoints.py OUTPUT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from autoround_modifier import AutoRoundModifier, AutoSchemeModifier, list_recipes, load_recipe

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import quantize, tiny_llama, token_samples


def quantized_recipes() -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the name of each shipped recipe, and the model that it quantized."""
    for name in list_recipes():
        if name.startswith("gguf_"):  # for llama.cpp
            continue
        modifiers = load_recipe(name, preset="rtn").modifiers
        kinds = (AutoSchemeModifier, AutoRoundModifier)
        recipe = [modifier for modifier in modifiers if isinstance(modifier, kinds)]
        model = tiny_llama(num_layers=1, hidden_size=256)  # 128 divides its features
        quantize(model, recipe, token_samples(4))
        yield name, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    for name, model in quantized_recipes():
        model.save_pretrained(output / name, save_compressed=True)
        print(f"{name}: {output / name}", flush=True)


if __name__ == "__main__":
    main()
