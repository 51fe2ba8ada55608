"""Step 1, in the package's environment: a tiny checkpoint for each shipped recipe.

    python make_checkpoints.py OUTPUT

``OUTPUT/checkpoints/<recipe>``, and ``OUTPUT/memory.json``: the logits of each model in memory, in
the form of what `reload.py` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from reload import TOKENS

sys.path.append(str(Path(__file__).parent.parent / "vllm"))
from make_recipe_checkpoints import quantized_recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    in_memory = {}
    for name, model in quantized_recipes():
        with torch.no_grad():
            logits = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        in_memory[name] = {"logits": logits.float().tolist()}
        model.save_pretrained(output / "checkpoints" / name, save_compressed=True)
    (output / "memory.json").write_text(json.dumps({"checkpoints": in_memory}), encoding="utf-8")
    print(f"{len(in_memory)} checkpoints: {output}")


if __name__ == "__main__":
    main()
