"""
Text of another kind than an encyclopedia: Python's own standard library.

    python benchmarks/code_text.py output/code.jsonl

Writes a JSON-lines file as `accuracy.py` reads it: one module a line, of which every fourth
evaluates. The library is that of the running Python; another version gives other texts.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

from autoround_modifier.runs.files import write_atomically

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
SMALLEST = 4000  # characters
EVERY = 4


def main() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    lines: list[str] = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        text = path.read_text(encoding="utf-8", errors="replace")
        if LEFT_OUT.isdisjoint(name.parts) and len(text) >= SMALLEST:
            split = "calib" if len(lines) % EVERY else "eval"
            lines.append(json.dumps({"title": name.as_posix(), "text": text, "split": split}))
    output = Path(sys.argv[1])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "\n".join(lines) + "\n")
    print(f"{output}: {len(lines)} modules")


if __name__ == "__main__":
    main()
