"""Step 1, in the package's environment: tiny checkpoints, and what the table says of them.

    python make_checkpoints.py OUTPUT

``OUTPUT/recipes`` has one checkpoint for each shipped recipe, ``OUTPUT/schemes`` one for each of
`SCHEMES`, ``OUTPUT/exports`` what was exported of some of them, as ``<format>-<recipe>``.
``OUTPUT/said.json``: folder -> compute capability -> what `engines.sglang_table` says of each
scheme of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from autoround_modifier import AutoRoundModifier, export, inspect_checkpoint
from autoround_modifier.engines.support import Hardware
from autoround_modifier.scheme_names import group_named

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "vllm"))
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from make_recipe_checkpoints import quantized_recipes

CAPABILITIES = (75, 80, 89, 90, 100)
SCHEMES: dict[str, dict[str, Any]] = {
    "w2a16_channel": weight_scheme(2, group_size=None),
    "w3a16_asym_channel": weight_scheme(3, False, None),
    "w4a16_channel": weight_scheme(4, group_size=None),
    "w4a16_g16": weight_scheme(4, group_size=16),
    "w4a16_g32": weight_scheme(4, group_size=32),
    "w4a16_g256": weight_scheme(4, group_size=256),
    "w4a16_asym_channel": weight_scheme(4, False, None),
    "w5a16_g64": weight_scheme(5, group_size=64),
    "w6a16_asym_g64": weight_scheme(6, False, 64),
    "w7a16_g64": weight_scheme(7, group_size=64),
    "w8a16_g64": weight_scheme(8, group_size=64),
    "w8a16_asym_g64": weight_scheme(8, False, 64),
    "w8a16_asym_channel": weight_scheme(8, False, None),
    "w4a8_one_to_a_byte": group_named("W4A8"),
    "w2a16_by_expression": weight_scheme(2, group_size=64, targets=[r"re:.*_proj$"]),
}
EXPORTS = {
    "awq": ("w4a16", "w4a16_asym"),
    "gptq": ("w2a16", "w2a16_asym", "w3a16", "w4a16", "w4a16_asym", "w8a16"),
    "auto_round": ("w2a16", "w2a16_asym", "w3a16", "w4a16", "w4a16_asym", "w8a16"),
}


def said(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """:return: compute capability -> kernel, option and note for each scheme of a checkpoint"""
    (sglang,) = (x for x in inspect_checkpoint(folder).elsewhere if x.engine == "SGLang")
    return {
        str(capability): [
            {"scheme": x.scheme, "kernel": x.kernel, "option": x.option, "note": x.note}
            for x in sglang.kernels[Hardware("cuda", capability)]
        ]
        for capability in CAPABILITIES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    for name, model in quantized_recipes():
        model.save_pretrained(output / "recipes" / name, save_compressed=True)
    for name, group in SCHEMES.items():
        model = tiny_llama(num_layers=1, hidden_size=256)
        groups = {"group_0": {"targets": ["Linear"], **group}}
        modifier = AutoRoundModifier(preset="rtn", config_groups=groups, ignore=["lm_head"])
        quantize(model, modifier, token_samples(4))
        model.save_pretrained(output / "schemes" / name, save_compressed=True)
    for format, recipes in EXPORTS.items():
        for recipe in recipes:
            source = output / "recipes" / f"{recipe}_autoround"
            export(source, format, output / "exports" / f"{format}-{recipe}")
    folders = sorted(x for kind in ("recipes", "schemes") for x in (output / kind).iterdir())
    table = {str(folder.relative_to(output)): said(folder) for folder in folders}
    (output / "said.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    print(f"{len(folders)} checkpoints: {output}")


if __name__ == "__main__":
    main()
