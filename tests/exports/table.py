"""
A Markdown table of what the tests of exported checkpoints found: weights by format and engine.

    python table.py OUTPUT

Reads ``results/*.json`` below ``OUTPUT`` and writes ``table.md`` there. Every cell was run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rows import ROWS, Row

# Engine, beginning of the format, heading
COLUMNS = [
    ("gptqmodel", "gptq", "`gptq`: Transformers, GPTQModel"),
    ("gptqmodel", "awq", "`awq`: Transformers, GPTQModel"),
    ("auto_round", "auto_round", "`auto_round`: Transformers, auto-round"),
    ("gguf", "gguf:", "`gguf`: Transformers"),
    ("llama_cpp", "gguf:", "`gguf`: llama.cpp"),
    ("mlx", "mlx", "`mlx`: mlx-lm"),
    ("vllm", "gptq", "`gptq`: vLLM"),
    ("vllm", "awq", "`awq`: vLLM"),
    ("vllm", "auto_round", "`auto_round`: vLLM"),
]


def label(row: Row) -> str:
    """:return: such as ``W4 asymmetric, channel``"""
    if row.preset:
        return row.preset.upper().removeprefix("GGUF:").removesuffix("A16")
    bits = {scheme[0] for scheme in row.schemes}
    text = " and ".join(f"W{number}" for number in sorted(bits, reverse=True))
    if not row.schemes[0][1]:
        text += " asymmetric"
    if row.schemes[0][2] is None:
        text += ", channel"
    elif len(bits) == 1 and len(row.schemes) > 1:
        text += ", mixed groups"
    if row.ignored:
        text += f", without {'a block' if 'layers' in row.ignored[0] else 'down_proj'}"
    return text


def cell(entries: list[dict[str, Any]]) -> str:
    """:param entries: of the same kind of weights, in one engine"""
    said = {entry["said"] for entry in entries}
    parts = []
    gaps = [entry["gap"] for entry in entries if "gap" in entry]
    if gaps:
        types = sorted({entry["format"].rpartition(":")[2] for entry in entries if "gap" in entry})
        name = f"{', '.join(types)}: " if entries[0]["format"].startswith("gguf:") else ""
        parts.append(f"{name}{max(gaps):.2g}")
    if "weights" in said:
        divergence = max(entry["divergence"] for entry in entries if "divergence" in entry)
        types = sorted({kind for entry in entries for kind in entry.get("kernels", [])})
        parts.append(f"{', '.join(types)}: weights equal, divergence {divergence:.2g}")
    if "fails" in said:
        parts.append("fails")
    if "GPTQModel" in said:
        parts.append("GPTQModel alone")
    refused = sorted({x["format"].rpartition(":")[2] for x in entries if x["said"] == "refused"})
    if refused:
        parts.append(f"{', '.join(refused)} refused" if ":" in entries[0]["format"] else "refused")
    return "; ".join(parts)


def main() -> None:
    output = Path(sys.argv[1])
    found = {
        path.stem: json.loads(path.read_text()) for path in (output / "results").glob("*.json")
    }
    columns = [column for column in COLUMNS if column[0] in found]
    names: dict[str, list[str]] = {}
    for row in ROWS:
        names.setdefault(label(row), []).append(row.name)
    lines = [("weights", *(heading for *_, heading in columns)), ("---",) * (len(columns) + 1)]
    for weights, rows in names.items():
        cells = [
            [
                entry
                for entry in found[engine]["results"]
                if entry["row"] in rows and entry["format"].startswith(format)
            ]
            for engine, format, _ in columns
        ]
        lines.append((weights, *(cell(entries) if entries else "" for entries in cells)))
    versions = {
        name: number for engine in found.values() for name, number in engine["versions"].items()
    }
    said = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (output / "table.md").write_text(f"{text}\nVersions: {said}.\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
