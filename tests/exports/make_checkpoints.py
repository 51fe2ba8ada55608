"""
Tunes a tiny Llama for each row, saves it, and exports it to every format that holds it.

    python make_checkpoints.py OUTPUT [--smollm2 FOLDER --llama-cpp FOLDER]

Runs in the package's own environment. ``dense`` beside each checkpoint is the reference: the
dequantized model in float32, for the same engine in the same version. With ``--smollm2``, the real
model in 4 and in 2 bits as well, which needs llama.cpp's source for GGUF; few iterations, since
what is compared is what engines make of the same integers. A checkpoint of it that is there is
exported as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from autoround_modifier import (
    AutoRoundModifier,
    ExportError,
    export,
    oneshot,
    quantized_weights,
    self_generated,
)
from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks, find_blocks_file
from autoround_modifier.exports.export_formats import FORMATS

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import VOCABULARY, quantize, tiny_llama, weight_scheme
from names import name_cases
from rows import ALL_LINEARS, ROWS, Row
from smollm2 import packaged_gguf

# Writes GGUF without vocabulary; SmolLM2 goes through llama.cpp's own converter.
TINY_CONVERTER = Path(__file__).parent.parent / "fake_llama_cpp"
TOKENS = (4, 48)
ROPE_THETA = 500.0  # no engine's default
SMOLLM2_FORMATS = ("gptq", "awq", "auto_round", "mlx", "gguf:q2_0", "gguf:q4_0")
SMOLLM2 = [Row(f"smollm2_w{bits}", ((bits, True, 64, ALL_LINEARS),)) for bits in (4, 2)]
TEXT = "The capital of France is Paris. In 1969, people walked on the moon; naïve, café — 你好"
CALIBRATION = {"num_samples": 32, "max_seq_length": 128}


def modifier(row: Row, iters: int) -> AutoRoundModifier:
    if row.preset:
        return AutoRoundModifier(scheme=row.preset, ignore=["lm_head", *row.ignored], iters=iters)
    groups = {
        f"group_{number}": weight_scheme(*scheme) for number, scheme in enumerate(row.schemes)
    }
    return AutoRoundModifier(config_groups=groups, ignore=["lm_head", *row.ignored], iters=iters)


def dequantized_weights(checkpoint: Path) -> dict[str, Tensor]:
    """:return: of the quantized layers, float32"""
    if find_blocks_file(checkpoint):
        saved = load_file(checkpoint / "model.safetensors")  # float32, as the model was
        return {f"{name}.weight": saved[f"{name}.weight"] for name in SavedBlocks(checkpoint).types}
    weights = {}
    for name, weight in quantized_weights(checkpoint).items():
        repeats = weight.values.shape[1] // weight.scale.shape[1]
        values, scale = weight.values.float(), weight.scale.float().repeat_interleave(repeats, 1)
        if "zero_point" in weight.parts:
            values -= weight.zero_point.float().repeat_interleave(repeats, 1)
        found = scale * values
        if weight.global_scale is not None:
            found *= 1 / weight.global_scale
        weights[f"{name}.weight"] = found
    return weights


def save_dense(checkpoint: Path, folder: Path, model: PreTrainedModel) -> None:
    """
    :param model: the same before it was quantized, in float32
    """
    model.load_state_dict(dequantized_weights(checkpoint), strict=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def save_reference(folder: Path, dtype: torch.dtype) -> None:
    """
    Write the dequantized model of a tiny checkpoint, and its logits of random tokens.

    :param dtype: of the model before it was quantized
    """
    dense = tiny_llama(dtype, hidden_size=256, rope_theta=ROPE_THETA).float()
    save_dense(folder / "checkpoint", folder / "dense", dense)
    ids = torch.randint(3, VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = dense.eval()(ids).logits
    save_file({"token_ids": ids, "logits": logits}, folder / "reference.safetensors")


def export_all(
    folder: Path,
    llama_cpp: Path,
    formats: Iterable[str] = FORMATS,
    vocabulary: Path | None = None,
) -> list[dict]:
    """:return: for each format where it is, or why it cannot hold the checkpoint"""
    found = []
    for name in formats:
        gguf = name.startswith("gguf:")
        path = folder / (f"{name.replace(':', '_')}.gguf" if gguf else name)
        arguments = {"llama_cpp": llama_cpp, "vocabulary": vocabulary} if gguf else {}
        entry: dict = {"row": folder.name, "format": name}
        try:
            exported = export(folder / "checkpoint", name, path, overwrite=True, **arguments)
            entry |= {"path": str(path.relative_to(folder.parent)), "bytes": exported.bytes}
        except ExportError as error:
            if "cannot hold this checkpoint" not in str(error):
                raise
            entry["refused"] = str(error)
        found.append(entry)
    return found


def make_tiny(row: Row, output: Path) -> list[dict]:
    folder = output / row.name
    # Weights tuned in types of GGUF are saved in the model's dtype.
    dtype = torch.float32 if row.preset.startswith("gguf:") else torch.bfloat16
    model = tiny_llama(dtype, hidden_size=256, rope_theta=ROPE_THETA)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    quantize(model, modifier(row, iters=2), output_dir=str(folder / "checkpoint"))
    save_reference(folder, dtype)
    return export_all(folder, TINY_CONVERTER, (f"gguf:{row.name}",) if row.preset else FORMATS)


def make_smollm2(row: Row, source: Path, output: Path, llama_cpp: Path) -> list[dict]:
    folder = output / row.name
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not (folder / "checkpoint").is_dir():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        dataset = self_generated(model, tokenizer, **CALIBRATION)
        oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=modifier(row, iters=10))
        model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    save_dense(folder / "checkpoint", folder / "dense", dense)
    text = {"text": TEXT, "token_ids": tokenizer(TEXT)["input_ids"]}
    (folder / "text.json").write_text(json.dumps(text))
    return export_all(folder, llama_cpp, SMOLLM2_FORMATS, packaged_gguf())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", nargs="*", help="names; without it, all")
    parser.add_argument("--smollm2", type=Path, help="a checkpoint of SmolLM2-135M")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source, for SmolLM2")
    arguments = parser.parse_args()
    output = arguments.output

    output.mkdir(parents=True, exist_ok=True)
    (output / "names.json").write_text(json.dumps(name_cases(), indent=1))
    index = output / "exports.json"
    entries = json.loads(index.read_text()) if index.is_file() else []

    def keep(row: Row, found: list[dict]) -> None:
        entries[:] = [entry for entry in entries if entry["row"] != row.name] + found
        index.write_text(json.dumps(entries, indent=1))
        formats = ", ".join(entry["format"] for entry in found if "path" in entry)
        print(f"{row.name}: {formats}", flush=True)

    for row in ROWS:
        if arguments.rows is None or row.name in arguments.rows:
            keep(row, make_tiny(row, output))
    if arguments.smollm2:
        for row in SMOLLM2:
            keep(row, make_smollm2(row, arguments.smollm2, output, arguments.llama_cpp))


if __name__ == "__main__":
    main()
