"""Step 1, in the package's environment: tiny checkpoints, and what the table says of them.

    python make_checkpoints.py OUTPUT

``OUTPUT/recipes`` has one checkpoint for each shipped recipe, ``OUTPUT/schemes`` one for each of
`SCHEMES`, ``OUTPUT/exports`` what was exported of some of them, as ``<format>-<recipe>``.
``OUTPUT/names`` has checkpoints whose `config.json` names layers one by one, as other programs
write it. ``OUTPUT/said.json``: folder -> ``kernels``: compute capability -> what
`engines.sglang_table` says of each scheme of the checkpoint; and ``problems``: architecture -> what
`engines.sglang_loader` says of the names, if the model is of that one. ``OUTPUT/classes.json``: of
which classes it knows that they say what they fuse, and of which that they do not.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoround_modifier import AutoRoundModifier, export, inspect_checkpoint
from autoround_modifier.checkpoints.saved_files import read_layout
from autoround_modifier.engines.sglang_loader import SAYING, SILENT, sglang_problems
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
# The first says nothing of what its class fuses
ARCHITECTURES = ("LlamaForCausalLM", "Gemma2ForCausalLM")
BLOCK = "model.layers.0"
ATTENTION = [f"{BLOCK}.self_attn.{x}_proj" for x in "qkv"]
MLP = [f"{BLOCK}.mlp.{x}_proj" for x in ("gate", "up", "down")]
REST = [*MLP, f"{BLOCK}.self_attn.o_proj"]
FUSED = [f"{BLOCK}.self_attn.qkv_proj", f"{BLOCK}.mlp.gate_up_proj"]
# Name -> what `ignore` names, layers in 16 bits, targets of a group of 4 bits, and of one of 8
NAMES: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    "by_name": ([], [], [*ATTENTION, *REST], []),
    "by_fused_name_too": ([], [], [*ATTENTION, *REST, *FUSED], []),
    "by_name_in_two_groups": ([], [], ATTENTION, REST),
    "by_fused_name_in_two_groups": ([], [], [*ATTENTION, FUSED[0]], [*REST, FUSED[1]]),
    "by_name_beside_the_class": ([], [], ATTENTION, ["Linear"]),
    "by_fused_name_beside_the_class": ([], [], [*ATTENTION, FUSED[0]], ["Linear"]),
    "several_schemes": ([], [], ATTENTION[:1], [*ATTENTION[1:], *REST, *FUSED]),
    "ignored_by_name": (ATTENTION, ATTENTION, ["Linear"], []),
    "ignored_by_fused_name_too": ([*ATTENTION, FUSED[0]], ATTENTION, ["Linear"], []),
    "ignored_by_expression": ([r"re:.*self_attn\.[qkv]+_proj"], ATTENTION, ["Linear"], []),
    "ignored_by_name_without_the_class": (ATTENTION, ATTENTION, [*REST, FUSED[1]], []),
    "ignored_by_the_end_of_a_fused_name": (["self_attn.qkv_proj"], [], ["Linear"], []),
}


def said(folder: Path) -> dict[str, Any]:
    """:return: what we say of SGLang: kernels by compute capability, problems by architecture"""
    (sglang,) = (x for x in inspect_checkpoint(folder).elsewhere if x.engine == "SGLang")
    layout = read_layout(folder)
    return {
        "kernels": {
            str(capability): [
                {"scheme": x.scheme, "kernel": x.kernel, "option": x.option, "note": x.note}
                for x in sglang.kernels[Hardware("cuda", capability)]
            ]
            for capability in CAPABILITIES
        },
        "problems": {
            name: [
                str(problem)
                for problem in sglang_problems(
                    replace(layout, config={**layout.config, "architectures": [name]})
                )
            ]
            for name in ARCHITECTURES
        },
    }


def save_by_names(output: Path) -> None:
    """Save the checkpoints of `NAMES`, with these very targets and names to ignore."""
    for name, (ignore, plain, *targets) in NAMES.items():
        written = [own for own in targets if own]
        groups = {
            f"group_{i}": weight_scheme(bits, group_size=64, targets=set(own) - set(FUSED))
            for i, (bits, own) in enumerate(zip((4, 8), written, strict=False))
        }
        modifier = AutoRoundModifier(
            preset="rtn", config_groups=groups, ignore=["lm_head", *plain], engine="none"
        )
        model = tiny_llama(num_layers=1, hidden_size=256)
        quantize(model, modifier, token_samples(4))
        model.save_pretrained(output / name, save_compressed=True)
        file = output / name / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        section = config["quantization_config"]
        for group, own in zip(section["config_groups"].values(), written, strict=True):
            group["targets"] = own
        section["ignore"] = ["lm_head", *ignore]
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")


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
    save_by_names(output / "names")
    for format, recipes in EXPORTS.items():
        for recipe in recipes:
            source = output / "recipes" / f"{recipe}_autoround"
            export(source, format, output / "exports" / f"{format}-{recipe}")
    folders = sorted(
        x for kind in ("recipes", "schemes", "names") for x in (output / kind).iterdir()
    )
    table = {str(folder.relative_to(output)): said(folder) for folder in folders}
    (output / "said.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    classes = json.dumps({"silent": SILENT, "saying": SAYING}, indent=1)
    (output / "classes.json").write_text(classes, encoding="utf-8")
    print(f"{len(folders)} checkpoints: {output}")


if __name__ == "__main__":
    main()
