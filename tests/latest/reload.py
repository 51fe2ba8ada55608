"""What the Transformers of this process computes from saved checkpoints, in bfloat16.

    python reload.py CHECKPOINTS OUTPUT [--dequantize]

``OUTPUT``, a JSON file: the versions, and for each checkpoint its logits or why it is refused.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))


def reload(folder: Path, dequantize: bool) -> list[list[list[float]]]:
    """
    :param folder: of a checkpoint
    :param dequantize: decompress every weight while the checkpoint is loaded
    :return: logits, (batch, tokens, vocabulary)
    :raises Exception: whatever Transformers raises; `ValueError` if it leaves weights out
    """
    options: dict[str, Any] = {}
    if dequantize:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info[kind])):
            raise ValueError(f"{kind}: {found[0]} and {len(found) - 1} more")
    with torch.no_grad():
        logits = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return logits.float().tolist()


def first_line(error: Exception) -> str:
    """:return: its type and the first line of what it says"""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dequantize", action="store_true")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, dict[str, Any]] = {}
    for config in sorted(arguments.checkpoints.glob("*/config.json")):
        try:
            found[config.parent.name] = {"logits": reload(config.parent, arguments.dequantize)}
        except Exception as error:  # whatever it raises, a user would meet
            found[config.parent.name] = {"refused": first_line(error)}
    versions = {
        name: importlib.metadata.version(name)
        for name in ("transformers", "compressed-tensors", "torch")
    }
    document = {"versions": versions, "checkpoints": found}
    arguments.output.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main()
