"""
What engines compute from exported checkpoints of SmolLM2-135M, and how large the files are.

    make bench-exports TEXT=path/to/text.jsonl

``TEXT`` is a JSON-lines file with a field ``text``; lines with ``"split": "eval"`` are used, if
there are any. The checkpoints are those of ``tests/exports/make_checkpoints.py --smollm2``. Each
engine runs in its own environment. Results are written to a JSON file after each engine, and as a
Markdown table beside it; rows that the file already holds do not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from export_engines import PREFIX, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoround_modifier.runs.files import write_atomically

CHILD = Path(__file__).parent / "export_engines.py"
VLLM_SITE = Path(__file__).parent.parent / "tests" / "vllm" / "site"
# checkpoint -> format, engine, environment. "checkpoint" is the one in compressed-tensors.
ROWS = {
    "smollm2_w4": [
        ("checkpoint", "transformers", "package"),
        ("gptq", "transformers", "exports"),
        ("awq", "transformers", "exports"),
        ("auto_round", "transformers", "exports"),
        ("gguf_q4_0.gguf", "transformers", "exports"),
        ("gguf_q4_0.gguf", "llama_cpp", "llama-cpp"),
        ("mlx", "mlx", "mlx"),
        ("checkpoint", "vllm", "vllm"),
        ("gptq", "vllm", "vllm"),
        ("awq", "vllm", "vllm"),
        ("auto_round", "vllm", "vllm"),
    ],
    "smollm2_w2": [
        ("checkpoint", "transformers", "package"),
        ("gptq", "transformers", "exports"),
        ("auto_round", "transformers", "exports"),
        ("gguf_q4_0.gguf", "transformers", "exports"),
        ("gguf_q2_0.gguf", "llama_cpp", "llama-cpp"),
        ("gguf_q4_0.gguf", "llama_cpp", "llama-cpp"),
        ("mlx", "mlx", "mlx"),
    ],
}
HEADER = (
    *("checkpoint", "format", "engine", "computed in", "KL from unquantized"),
    *("KL from the tuned weights", "size, MB"),
)
NAMES = {"transformers": "Transformers", "llama_cpp": "llama.cpp", "mlx": "MLX", "vllm": "vLLM"}
COMPUTED = {
    "transformers": "float32",
    "llama_cpp": "8-bit activations",
    "mlx": "float32",
    "vllm": "bfloat16",
}


def eval_tokens(text: Path, tokenizer, sequences: int, length: int) -> np.ndarray:
    """:return: (sequences, length), of as many different lines"""
    lines = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line.get("split") == "eval"] or lines
    found = []
    for line in wanted:
        ids = tokenizer(line["text"])["input_ids"]
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == sequences:
            return np.array(found)
    raise SystemExit(f"{text} has {len(found)} texts of {length} tokens, not {sequences}")


@torch.no_grad()
def save_log_probabilities(model: Path, tokens: np.ndarray, path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = [log_softmax(loaded(torch.tensor(ids)[None]).logits[0, :-1].numpy()) for ids in tokens]
    np.save(path, np.stack(found))


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def format_of(name: str) -> str:
    """
    :param name: of a folder or file of ``make_checkpoints.py``
    :return: such as ``gguf:q4_0``
    """
    if name == "checkpoint":
        return "compressed-tensors"
    return name.removesuffix(".gguf").replace("gguf_", "gguf:")


def table(results: list[dict]) -> str:
    lines = [HEADER, ("---",) * len(HEADER)]
    for row in results:
        lines.append(
            (
                row["checkpoint"].removeprefix("smollm2_").upper(),
                format_of(row["format"]),
                NAMES[row["engine"]],
                COMPUTED[row["engine"]],
                f"{row['unquantized']:.4f}",
                f"{max(row['dequantized'], 0.0):.6f}",
                f"{row['bytes'] / 1e6:.1f}",
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("model", type=Path, help="SmolLM2-135M, not quantized")
    parser.add_argument("checkpoints", type=Path, help="folder of make_checkpoints.py")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--python", nargs="*", default=[], metavar="ENVIRONMENT=PYTHON")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()

    pythons = {"package": sys.executable, **dict(x.split("=", 1) for x in arguments.python)}
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else []
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = eval_tokens(arguments.text, tokenizer, arguments.sequences, arguments.length)
    for checkpoint, rows in ROWS.items():
        folder = arguments.checkpoints / checkpoint
        references = folder / "references"
        references.mkdir(exist_ok=True)
        np.save(references / "tokens.npy", tokens)
        for name, model in (
            ("unquantized", arguments.model),
            ("dequantized", folder / "dense"),
        ):
            save_log_probabilities(model, tokens, references / f"{name}.npy")
        done = {
            (row["format"], row["engine"]) for row in results if row["checkpoint"] == checkpoint
        }
        by_engine: dict[tuple[str, str], list[str]] = {}
        for format, engine, environment in rows:
            if (format, engine) not in done and environment in pythons:
                by_engine.setdefault((engine, environment), []).append(format)
        for (engine, environment), formats in by_engine.items():
            paths = [str(folder / format) for format in formats]
            command = [pythons[environment], str(CHILD), engine, str(references), *paths]
            found = os.environ | ({"PYTHONPATH": str(VLLM_SITE)} if engine == "vllm" else {})
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=found)
            lines = [line for line in run.stdout.splitlines() if line.startswith(PREFIX)]
            for format, line in zip(formats, lines, strict=True):
                row = {"checkpoint": checkpoint, "format": format, "engine": engine}
                row |= json.loads(line.removeprefix(PREFIX))
                results.append({**row, "bytes": size_of(folder / format)})
                print(row, flush=True)
            write_atomically(arguments.output, json.dumps(results, indent=1))
            write_atomically(arguments.output.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
